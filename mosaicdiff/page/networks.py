"""What was pruned: the stages, what each block keeps, the error of each layer."""

from __future__ import annotations

from collections.abc import Sequence

from .curve import Axes, Band, Series, line_chart
from .data import Network, Page, ShownLayer
from .kept_map import common_heads, kept_map
from .layer_errors import has_errors, layer_errors
from .markup import Child, Markup, element
from .svg import NARROW, both_widths, stage_class
from .tables import data_table


def network_sections(page: Page) -> list[Markup]:
    """Return three sections for each pruned denoiser; where there are two, by their names."""
    several = len(page.networks) > 1
    sections = []
    for network in page.networks:
        of = f" of {network.component}" if several else ""
        tail = f"-{network.component}" if several else ""
        sections.append(_stages(network, of, f"stages{tail}"))
        sections.append(_kept(network, of, f"kept{tail}"))
        sections.append(_errors(network, of, f"errors{tail}"))
    return sections


def stage_legend(network: Network) -> Markup:
    """Return the stages' colours and marks, with their timesteps."""
    items = [
        element(
            "li",
            element("i", class_=f"key {stage_class(k)} shape-{k % 3}"),
            f"{stage.name} ",
            element("span", f"t {stage.first}–{stage.last}"),
        )
        for k, stage in enumerate(network.stages)
    ]
    return element("ul", *items, class_="legend")


def _stages(network: Network, of: str, anchor: str) -> Markup:
    return element(
        "section",
        element("h2", f"Stages{of}"),
        _curve(network),
        _stage_table(network),
        id=anchor,
    )


def _curve(network: Network) -> list[Markup]:
    curve = network.curve
    if curve is None:
        said = "The pipeline's scheduler gives no signal-to-noise ratio, so there is no score."
        return [element("p", said, class_="caption")]
    said = (
        "How fast the denoiser learns at each train timestep, by the closed-form score: t = 1 is "
        "the cleanest, noise grows to the right. Sampling runs from right to left. " + curve.origin
    )
    series = [
        Series("gain", curve.timesteps, curve.gain, "faint"),
        Series("score", curve.timesteps, curve.score, "ink"),
    ]
    bands = [
        Band(stage.name, stage.first, stage.last, stage_class(k))
        for k, stage in enumerate(network.stages)
    ]
    levels = [] if curve.threshold is None else [("threshold", curve.threshold)]
    where = ", ".join(f"{s.name} t {s.first} to {s.last}" for s in network.stages)
    label = f"Score over the train timesteps, divided into {where}."
    axes = Axes("train timestep t", "score", x_ticks=_ticks(network))
    drawn = both_widths(
        lambda width: line_chart(
            width, 260 if width > NARROW else 230, label, series, axes, bands, levels
        )
    )
    keys = element(
        "ul",
        element("li", element("i", class_="key rule ink"), "score"),
        element("li", element("i", class_="key rule faint"), "its gain of error alone"),
        class_="legend",
    )
    return [
        element("p", said, class_="caption"),
        element("figure", drawn, keys, class_="drawing"),
    ]


def _ticks(network: Network) -> list[float]:
    """Return the boundaries of the stages, those too near to the one before left out."""
    last = max(stage.last for stage in network.stages)
    ticks: list[float] = []
    for value in sorted({stage.first for stage in network.stages} | {last}):
        if not ticks or value - ticks[-1] >= 0.08 * last:
            ticks.append(value)
    return ticks


def _stage_table(network: Network) -> Markup:
    removed = "Weights removed" if network.of_weights else "MACs removed"
    columns = ["Stage", "Timesteps", "Steps", f"{removed}", "MACs, dense = 100%", "Mean error"]
    rows: list[list[Child]] = [
        [
            _named(k, stage.name),
            f"{stage.first}–{stage.last}",
            stage.steps,
            _share(stage.sparsity),
            _share(stage.macs),
            "–" if stage.error is None else f"{stage.error:.4f}",
        ]
        for k, stage in enumerate(network.stages)
    ]
    return data_table(f"Stages of {network.component}, noisiest first", columns, rows)


def _kept(network: Network, of: str, anchor: str) -> Markup:
    if network.of_weights:
        said = "The share of its weights that each linear keeps, a row a block: fuller is more."
    else:
        said = (
            "A row is a block, from the input down. Filled squares are heads that stay, hollow "
            "ones are gone; a bar is the share of neurons that stay, with their number."
        )
    heads = common_heads(network.layers)
    if len(heads) == 1:
        said += f" Numbers are those of {heads[0]}."
    return element(
        "section",
        element("h2", f"What is kept{of}"),
        element("p", said, class_="caption"),
        element("figure", both_widths(lambda width: kept_map(network, width)), class_="drawing"),
        _layer_details(network),
        id=anchor,
    )


def _layer_details(network: Network) -> Markup:
    columns = ["Layer", "Dense", *(stage.name for stage in network.stages)]
    rows = [
        [
            element("code", layer.name),
            f"{layer.groups:,} {layer.kind}",
            *(_kept_cell(layer, k) for k in range(len(network.stages))),
        ]
        for layer in network.layers
    ]
    table = data_table("Kept of each layer, and its error in parentheses", columns, rows)
    title = element("summary", f"Every layer in figures ({len(rows)})")
    return element("details", title, table)


def _kept_cell(layer: ShownLayer, stage: int) -> str:
    kept, error = layer.kept[stage], layer.errors[stage]
    written = f"{kept / layer.groups:.1%}" if layer.kind == "weights" else f"{kept:,}"
    if kept == layer.groups:
        return "whole"
    return written if error is None else f"{written} ({error:.4f})"


def _errors(network: Network, of: str, anchor: str) -> Markup:
    heading = element("h2", f"Error per layer{of}")
    if network.report is None:
        said = "The checkpoint holds no report, and with it no errors."
        return element("section", heading, element("p", said, class_="caption"), id=anchor)
    if not has_errors(network):
        said = "No layer has an error: nothing of them was removed."
        return element("section", heading, element("p", said, class_="caption"), id=anchor)
    said = (
        "The share of each layer's output energy that is lost, after the refit, on the "
        "calibration inputs of the stage. Lower is better, and the axis is logarithmic: a line "
        "down is a tenth. A layer that is whole has no point."
    )
    return element(
        "section",
        heading,
        element("p", said, class_="caption"),
        element(
            "figure",
            both_widths(lambda width: layer_errors(network, width)),
            stage_legend(network),
            class_="drawing",
        ),
        element("p", f"Largest: {_worst(network.layers, network)}.", class_="note"),
        id=anchor,
    )


def _worst(layers: Sequence[ShownLayer], network: Network, count: int = 3) -> str:
    found = [
        (error, layer.name, network.stages[k].name)
        for layer in layers
        for k, error in enumerate(layer.errors)
        if error
    ]
    largest = sorted(found, reverse=True)[:count]
    return "; ".join(f"{name} in {stage}, {error:.4f}" for error, name, stage in largest)


def _named(index: int, name: str) -> Markup:
    key = element("i", class_=f"key {stage_class(index)} shape-{index % 3}")
    return element("span", key, name, class_="keyed")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
