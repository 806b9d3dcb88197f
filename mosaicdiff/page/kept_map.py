"""Draw which heads and how many neurons each block keeps, stage beside stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..quantities import human_count
from .data import Network, ShownLayer
from .markup import Markup, element
from .svg import FONT, drawing, element_title, rectangle, stage_class, text, text_width

_ROW = 17
#: Heads are drawn one by one where each gets this many pixels, and not larger than that.
_LEAST_CELL, _MOST_CELL = 4.0, 12.0
#: Pixels of one kind of layer that a panel should have at least.
_PART = 92
_GUTTER = 34


@dataclass(frozen=True)
class _Row:
    """A heading (no layers) or a block and its layers by part."""

    label: str
    layers: dict[str, ShownLayer] | None = None


def kept_map(network: Network, width: int) -> Markup:
    """Draw a panel a stage: a row a block, a column for each kind of layer in it.

    Args:
        network: whose.
        width: of the drawing, in pixels.
    """
    rows = _rows(network.layers)
    kinds = {layer.part: layer.kind for layer in network.layers}
    parts = {part: f"{part}, {kind}" for part, kind in kinds.items()}
    labels = max(text_width(row.label) for row in rows if row.layers is not None) + 8
    least = labels + _PART * len(parts)
    stages = len(network.stages)
    across = max(1, min(stages, int((width + _GUTTER) // (least + _GUTTER))))
    panel = (width - _GUTTER * (across - 1)) / across
    tall = 2 * FONT + 16 + _ROW * len(rows) + 10
    drawn = []
    for index in range(stages):
        x, y = (index % across) * (panel + _GUTTER), (index // across) * (tall + 12)
        drawn.append(_panel(network, index, rows, parts, x, y, panel, labels))
    height = -(-stages // across) * (tall + 12) - 12
    return drawing(width, height, describe_kept(network), *drawn)


def describe_kept(network: Network) -> str:
    """Say in words what the picture of kept groups shows."""
    kinds = list(dict.fromkeys(layer.kind for layer in network.layers))
    said = []
    for index, stage in enumerate(network.stages):
        counts = []
        for kind in kinds:
            layers = [layer for layer in network.layers if layer.kind == kind]
            kept, dense = sum(r.kept[index] for r in layers), sum(r.groups for r in layers)
            counts.append(f"{human_count(kept)} of {human_count(dense)} {kind}")
        said.append(f"{stage.name}: {', '.join(counts)} kept")
    return f"Kept by block and stage. {'; '.join(said)}."


def _rows(layers: Sequence[ShownLayer]) -> list[_Row]:
    """Group layers by block; blocks that share all but their number stand under one heading."""
    blocks: dict[str, dict[str, ShownLayer]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, {})[layer.part] = layer
    heads = common_heads(layers)
    rows, above = [], None
    for block, found in blocks.items():
        head, _, last = block.rpartition(".")
        if not last.isdigit():
            head, last = "", block
        if head != above and head and len(heads) > 1:
            rows.append(_Row(head))
        above = head
        rows.append(_Row(last, found))
    return rows


def common_heads(layers: Sequence[ShownLayer]) -> list[str]:
    """Return the names of lists of blocks: what stands before a block's number."""
    heads = (layer.block.rpartition(".") for layer in layers)
    return list(dict.fromkeys(head for head, _, last in heads if last.isdigit()))


def _panel(
    network: Network,
    index: int,
    rows: Sequence[_Row],
    parts: Mapping[str, str],
    x: float,
    y: float,
    width: float,
    labels: float,
) -> Markup:
    stage, style = network.stages[index], stage_class(index)
    column = (width - labels) / len(parts)
    title = text(x, y + FONT, stage.name, "start", f"name {style}")
    steps = f"{stage.steps} step{'' if stage.steps == 1 else 's'}"
    given = steps if stage.sparsity is None else f"{stage.sparsity:.0%} removed, {steps}"
    drawn = [title, text(x + width, y + FONT, given, "end", "label")]
    for k, (part, long) in enumerate(parts.items()):
        fits = max(3, int((column - 8) / text_width("x")))
        short = next((t for t in (long, part) if len(t) <= fits), f"{part[: fits - 1]}…")
        drawn.append(text(x + labels + k * column, y + 2 * FONT + 8, short, "start", "tick"))
    top = y + 2 * FONT + 16
    for row in rows:
        if row.layers is None:
            drawn.append(text(x, top + _ROW - 4, _shorten(row.label, width), "start", "tick"))
        else:
            drawn.append(text(x + labels - 8, top + _ROW - 4, row.label, "end", "tick"))
            for k, part in enumerate(parts):
                layer = row.layers.get(part)
                if layer is not None:
                    left = x + labels + k * column
                    drawn.append(_layer(layer, index, left, top + 3, column - 10, style))
        top += _ROW
    return element("g", *drawn)


def _shorten(label: str, width: float) -> str:
    fits = int(width / text_width("x"))
    return label if len(label) <= fits else f"…{label[-fits + 1 :]}"


def _layer(layer: ShownLayer, stage: int, x: float, y: float, width: float, style: str) -> Markup:
    kept, tall = layer.kept[stage], _ROW - 6.0
    share = kept / layer.groups
    said = (
        f"{layer.name}: {share:.1%} of the weights kept"
        if layer.kind == "weights"
        else f"{layer.name}: {kept} of {layer.groups} {layer.kind} kept"
    )
    drawn = [element_title(said)]
    cell = min(_MOST_CELL, width / layer.groups)
    if layer.kind == "heads" and cell >= _LEAST_CELL:
        chosen = layer.indices[stage]
        for group in range(layer.groups):
            there = chosen is None or group in chosen
            gap = 1.5 if cell > 6 else 1.0
            class_ = f"kept {style}" if there else "removed"
            inset = 0.0 if there else 0.5
            drawn.append(
                rectangle(x + group * cell + inset, y + inset, cell - gap - 2 * inset,
                          tall - 2 * inset, class_)
            )  # fmt: skip
        return element("g", *drawn)
    widest = "100%" if layer.kind == "weights" else str(layer.groups)
    written = f"{share:.0%}" if layer.kind == "weights" else str(kept)
    room = text_width(widest) + 6
    bar = width - room if width - room > 24 else width
    drawn.append(rectangle(x + 0.5, y + 0.5, bar - 1, tall - 1, "removed"))
    drawn.append(rectangle(x, y, bar * share, tall, f"kept {style}"))
    if bar < width:
        drawn.append(text(x + width, y + tall - 0.5, written, "end", "tick"))
    return element("g", *drawn)
