"""Draw the error of every layer over depth, a panel for each kind of layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .curve import Axes, Series, chart_parts
from .data import Network, ShownLayer
from .markup import Markup, element
from .svg import FONT, decades, drawing, stage_class, text

_GUTTER = 24
#: A panel is at least this wide, and so tall.
_LEAST, _TALL = 250, 236


def has_errors(network: Network) -> bool:
    """Return whether any layer's error is known and above 0."""
    return any(error for layer in network.layers for error in layer.errors)


def layer_errors(network: Network, width: int) -> Markup:
    """Draw the lost share of each layer's output energy, a line a stage, over the blocks.

    Layers that are whole have no error and no point.

    Args:
        network: of which at least one error is above 0.
        width: of the drawing, in pixels.
    """
    blocks = list(dict.fromkeys(layer.block for layer in network.layers))
    panels = {
        part: [layer for layer in network.layers if layer.part == part]
        for part in dict.fromkeys(layer.part for layer in network.layers)
    }
    panels = {
        part: layers
        for part, layers in panels.items()
        if any(error for layer in layers for error in layer.errors)
    }
    across = max(1, min(len(panels), int((width + _GUTTER) // (_LEAST + _GUTTER))))
    panel = (width - _GUTTER * (across - 1)) / across
    known = [e for layer in network.layers for e in layer.errors if e]
    limits = decades(known)
    drawn = []
    for index, (part, layers) in enumerate(panels.items()):
        left = (index % across) * (panel + _GUTTER)
        top = (index // across) * (_TALL + 26)
        inner = chart_parts(panel, _TALL, _lines(network, layers, blocks), _axes(limits, blocks))
        name = text(0, FONT, part, "start", "heading")
        moved = element("g", *inner, transform=f"translate(0 {FONT + 4})")
        drawn.append(element("g", name, moved, transform=f"translate({left:.1f} {top})"))
    height = -(-len(panels) // across) * (_TALL + 26) - 8
    return drawing(width, height, describe_errors(network), *drawn)


def describe_errors(network: Network) -> str:
    """Say in words what the picture of errors shows."""
    said = []
    for index, stage in enumerate(network.stages):
        worst = max(network.layers, key=lambda layer: layer.errors[index] or 0.0)
        error = worst.errors[index]
        said.append(
            f"{stage.name}: largest {error:.2g}, {worst.name}" if error else f"{stage.name}: none"
        )
    return f"Error by layer and stage. {'; '.join(said)}."


def _axes(limits: tuple[float, float], blocks: Sequence[str]) -> Axes:
    step = max(1, -(-len(blocks) // 8))
    return Axes(
        x_label="block",
        y_label="lost share of the output's energy",
        logarithmic=True,
        x_ticks=range(0, len(blocks), step),
        write_y=_power,
        y_range=limits,
    )


def _power(value: float) -> str:
    """Write a power of ten: 0.01, but 1e-4."""
    return f"{value:g}" if 1e-3 <= value < 1e4 else f"1e{round(math.log10(value))}"


def _lines(network: Network, layers: Sequence[ShownLayer], blocks: Sequence[str]) -> list[Series]:
    place = {block: k for k, block in enumerate(blocks)}
    x = [place[layer.block] for layer in layers]
    lines = []
    for index, stage in enumerate(network.stages):
        y = [layer.errors[index] or None for layer in layers]
        lines.append(Series(stage.name, x, y, stage_class(index), index))
    return lines
