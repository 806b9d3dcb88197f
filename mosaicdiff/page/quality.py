"""Quality and cost of both models, at every guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..evaluate.evaluation import DENSE, PRUNED, Evaluation, Metric, Row
from ..quantities import human_bytes, human_count
from .bars import Bar, bar_chart
from .curve import Axes, Series, line_chart
from .data import Page
from .headline import chosen_metric, speed_pair, write_metric, write_scale, write_seconds
from .markup import Markup, coded, element
from .svg import NARROW, both_widths
from .tables import data_table

#: Kept on the line of a title's last word.
_ARROWS = {"lower": "↓", "higher": "↑"}
_ABOUT = {
    "reference": "against real pictures",
    "dense": "against the dense pictures",
    "condition": "against what was asked for",
    "itself": "of the pictures alone",
}


def quality_section(page: Page) -> Markup:
    """Return the metrics as a table and, over several scales of guidance, as a curve."""
    evaluation = page.evaluation
    return element(
        "section",
        element("h2", "Quality"),
        element("p", _about(evaluation), class_="caption"),
        _curve(evaluation),
        _rows(evaluation),
        _meanings(evaluation.metrics),
        [element("p", coded(note), class_="note") for note in evaluation.notes],
        id="quality",
    )


def cost_section(page: Page) -> Markup:
    """Return what one image takes of both models, as bars and in figures."""
    dense, pruned = speed_pair(page.evaluation)
    bars = [
        _bar("MACs an image", dense.macs_with_attention_per_image,
             pruned.macs_with_attention_per_image, human_count),
        _bar("Time an image", dense.seconds_per_image, pruned.seconds_per_image, write_seconds),
    ]  # fmt: skip
    reports = [network.report for network in page.networks]
    if len(reports) == 1 and reports[0] is not None:
        said = reports[0]
        bars.append(
            _bar("Parameters a step", said.parameters_dense, said.parameters_per_step, human_count)
        )
    bars.append(_bar("Parameters stored", dense.parameters, pruned.parameters, human_count))
    bars.append(_bar("Bytes on disk", dense.bytes, pruned.bytes, human_bytes))
    held = [network.memory for network in page.networks]
    whole = sum(memory.dense for memory in held)
    resident = sum(memory.resident for memory in held)
    swapped = sum(memory.swap_device for memory in held)
    bars.append(_bar("Loaded, all stages", whole, resident, human_bytes))
    bars.append(_bar("Loaded, swapped", whole, swapped, human_bytes))
    caption = (
        "Shorter is better. A step runs one stage, but a file holds them all: that is why storage "
        "can grow while every step computes less. Swapped, one stage is on the device at a time. "
        "Time is of the whole pipelines, batch by batch in turn; other work on the machine shows. "
        f"MACs and time are those at guidance {write_scale(dense.guidance_scale)}."
    )
    return element(
        "section",
        element("h2", "Cost"),
        element("p", caption, class_="caption"),
        element("figure", both_widths(lambda width: bar_chart(bars, width)), class_="drawing"),
        _costs(page.evaluation),
        id="cost",
    )


def _costs(evaluation: Evaluation) -> Markup:
    columns = ["Model", "Guidance", "Time an image", "Speed-up", "MACs an image",
               "MACs, attention left out", "Passes an image"]  # fmt: skip
    rows, classes = [], []
    for pair in evaluation.pairs:
        for row in pair:
            faster = evaluation.ratio(*pair).speedup if row is pair[1] else None
            rows.append(
                [
                    row.model,
                    write_scale(row.guidance_scale),
                    write_seconds(row.seconds_per_image),
                    "–" if faster is None else f"{faster:.2f}×",
                    human_count(row.macs_with_attention_per_image),
                    human_count(row.macs_per_image),
                    f"{row.passes_per_image:g}",
                ]
            )
            classes.append(row.model)
    return data_table("Time and MACs by model and guidance", columns, rows, classes=classes)


def _bar(label: str, dense: float, pruned: float, write: Callable[[float], str]) -> Bar:
    return Bar(label, pruned / dense, write(dense), write(pruned))


def _about(evaluation: Evaluation) -> str:
    setting = evaluation.setting
    said = [f"{setting.num_images:,} pictures a row."]
    if setting.reference is not None:
        count = "" if setting.reference_images is None else f"{setting.reference_images:,} "
        said.append(f"Real pictures are the {count}of {setting.reference}.")
    said.append("An arrow tells which way is better.")
    if len(setting.guidance_scales) > 1:
        said.append("Bold is the best guidance of each model.")
    return " ".join(said)


def _curve(evaluation: Evaluation) -> Markup | None:
    metric = chosen_metric(evaluation)
    scales = [scale for scale in evaluation.setting.guidance_scales if scale is not None]
    if metric is None or len(scales) < 2:
        return None
    ordered = sorted(scales)
    series = []
    for index, model in enumerate((DENSE, PRUNED)):
        known = [evaluation.row(model, scale).metrics.get(metric.name) for scale in ordered]
        y = [value if value is not None and math.isfinite(value) else None for value in known]
        if any(value is not None for value in y):
            series.append(Series(model, ordered, y, model, index))
    if not series:
        return None
    axes = Axes(
        "guidance scale",
        f"{metric.title}, {metric.better} is better",
        x_ticks=ordered,
        write_y=(lambda value: f"{value:.0%}") if metric.percent else (lambda value: f"{value:g}"),
    )
    values = "; ".join(
        f"{one.label}: "
        + ", ".join(
            f"{write_metric(metric, y)} at {x:g}" for x, y in zip(one.x, one.y, strict=True)
        )
        for one in series
    )
    label = f"{metric.title} over guidance. {values}."
    drawn = both_widths(
        lambda width: line_chart(width, 240 if width > NARROW else 220, label, series, axes)
    )
    key = [
        element("li", element("i", class_=f"key {one.style} shape-{one.shape}"), one.label)
        for one in series
    ]
    return element("figure", drawn, element("ul", *key, class_="legend"), class_="drawing")


def _rows(evaluation: Evaluation) -> Markup:
    columns = ["Model", "Guidance"]
    columns += [f"{_capital(m)}\u00a0{_ARROWS[m.better]}" for m in evaluation.metrics]
    several = len(evaluation.setting.guidance_scales) > 1
    rows, classes = [], []
    for row in evaluation.rows:
        rows.append(
            [
                row.model,
                write_scale(row.guidance_scale),
                *(_cell(metric, row, several) for metric in evaluation.metrics),
            ]
        )
        classes.append(row.model)
    return data_table("Quality by model and guidance", columns, rows, classes=classes)


def _cell(metric: Metric, row: Row, several: bool) -> Markup | str:
    written = write_metric(metric, row.metrics.get(metric.name))
    if several and metric.name in row.best_by:
        return element("b", written, title=f"best guidance of the {row.model} model")
    return written


def _meanings(metrics: Sequence[Metric]) -> Markup | None:
    if not metrics:
        return None
    alike: dict[tuple[str, str | None], list[str]] = {}
    for metric in metrics:
        alike.setdefault((metric.about, metric.network), []).append(metric.title)
    said = []
    for (about, network), titles in alike.items():
        where = "in pixels" if network is None else f"in features of {network}"
        listed = ", ".join(titles)
        said.append(f"{listed[0].upper()}{listed[1:]}: {_ABOUT[about]}, {where}.")
    return element("p", " ".join(said), class_="note")


def _capital(metric: Metric) -> str:
    return metric.title[0].upper() + metric.title[1:]
