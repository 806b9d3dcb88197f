"""The figures that come first: what was won, and what it cost."""

from __future__ import annotations

import math

from ..evaluate.compare import FEW_BATCHES
from ..evaluate.evaluation import Evaluation, Metric, Row
from ..quantities import human_bytes, human_count
from .data import Network, Page
from .markup import Markup, element, join


def headline(page: Page) -> Markup:
    """Return what the model is, in one sentence, and the figures."""
    setting = page.evaluation.setting
    first, *_ = page.networks
    removed = _removed(first)
    stages = len(first.stages)
    among = "one stage" if stages == 1 else f"{stages} stages"
    source = setting.models.get("dense") or first.source or "an unnamed model"
    sentence = (
        f"{setting.pipeline} with {first.kind}, pruned from {source}{removed}, in {among}. "
        f"Measured on {_pictures(setting.num_images)} of each model, made from the same noise."
    )
    return join(
        element("p", "mosaicdiff report", class_="eyebrow"),
        element("h1", page.model),
        element("p", sentence, class_="lead"),
        element("dl", *figures(page), class_="figures"),
    )


def figures(page: Page) -> list[Markup]:
    """Return speed-up, MACs, parameters, disk and the chosen metric, dense beside pruned."""
    evaluation = page.evaluation
    dense, pruned = speed_pair(evaluation)
    ratio = evaluation.ratio(dense, pruned)
    scale = f", guidance {write_scale(dense.guidance_scale)}" if _several(evaluation) else ""
    made = [
        _figure(
            "Speed-up",
            f"{ratio.speedup:.2f}×",
            f"{write_seconds(dense.seconds_per_image)} → "
            f"{write_seconds(pruned.seconds_per_image)} an image{scale}{_rough(evaluation)}",
        ),
        _figure(
            "Fewer MACs",
            f"{ratio.macs_with_attention:.2f}×",
            f"{human_count(dense.macs_with_attention_per_image)} → "
            f"{human_count(pruned.macs_with_attention_per_image)} an image, with attention",
        ),
        _parameters(page, dense, pruned),
        _figure(
            "On disk",
            human_bytes(pruned.bytes),
            f"dense {human_bytes(dense.bytes)}; all stages together",
        ),
    ]
    quality = _quality(evaluation)
    return made if quality is None else [*made, quality]


def _rough(evaluation: Evaluation) -> str:
    """Say so where a time is of few batches."""
    setting = evaluation.setting
    batches = -(-setting.num_images // setting.batch_size)
    return "" if batches >= FEW_BATCHES else f"; of {batches} batch{'es' * (batches > 1)}: rough"


def speed_pair(evaluation: Evaluation) -> tuple[Row, Row]:
    """Return the rows that are compared for time: both at the guidance best for the dense model.

    Where nothing chooses, those at the first guidance.
    """
    pair = evaluation.best_pair
    scale = evaluation.setting.guidance_scales[0] if pair is None else pair[0].guidance_scale
    return evaluation.row("dense", scale), evaluation.row("pruned", scale)


def write_scale(scale: float | None) -> str:
    """Write a guidance scale; None is the pipeline's own."""
    return "as usual" if scale is None else f"{scale:g}"


def write_seconds(seconds: float) -> str:
    """Write a time with its unit."""
    value, unit = (1e3 * seconds, "ms") if seconds < 1 else (seconds, "s")
    return f"{value:#.3g}".rstrip(".") + f" {unit}"


def write_metric(metric: Metric, value: float | None) -> str:
    """Write a figure as its metric is read; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):  # e.g. the PSNR of equal pictures
        return "∞"
    if metric.percent:
        return f"{value:.1%}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def chosen_metric(evaluation: Evaluation) -> Metric | None:
    """Return the metric that chooses the best guidance, or the first there is."""
    if evaluation.best_by is not None:
        return evaluation.metric(evaluation.best_by)
    return evaluation.metrics[0] if evaluation.metrics else None


def _parameters(page: Page, dense: Row, pruned: Row) -> Markup:
    """Return the parameters one step uses where the report says so, else those stored."""
    reports = [network.report for network in page.networks]
    stored = f"all stages {human_count(pruned.parameters)}, dense {human_count(dense.parameters)}"
    if len(reports) == 1 and reports[0] is not None:
        used = human_count(reports[0].parameters_per_step)
        return _figure("Parameters a step", used, stored)
    return _figure("Parameters", human_count(pruned.parameters), stored)


def _quality(evaluation: Evaluation) -> Markup | None:
    metric = chosen_metric(evaluation)
    if metric is None:
        return None
    dense, pruned = evaluation.best_pair or speed_pair(evaluation)
    value = write_metric(metric, pruned.metrics.get(metric.name))
    said = []
    if metric.name in dense.metrics:
        said.append(f"dense {write_metric(metric, dense.metrics[metric.name])}")
    elif metric.about == "dense":
        said.append("to the dense pictures")
    said.append(f"{metric.better} is better")
    if _several(evaluation) and evaluation.best_pair is not None:
        scales = [write_scale(row.guidance_scale) for row in (dense, pruned)]
        said.append(
            f"at guidance {scales[0]}, the best of both"
            if scales[0] == scales[1]
            else f"each at its best guidance (dense {scales[0]}, pruned {scales[1]})"
        )
    return _figure(metric.title, value, "; ".join(said))


def _figure(name: str, value: str, note: str) -> Markup:
    return element(
        "div",
        element("dt", name),
        element("dd", value, class_="value"),
        element("dd", note, class_="note"),
    )


def _several(evaluation: Evaluation) -> bool:
    return len(evaluation.setting.guidance_scales) > 1


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count:,} pictures"


def _removed(network: Network) -> str:
    if network.report is None:
        return ""
    what = "weights" if network.of_weights else "prunable MACs"
    return f" by {network.report.sparsity:.0%} of its {what}"
