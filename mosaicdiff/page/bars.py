"""Draw bars of the pruned model, the dense one being 100%."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Markup
from .svg import FONT, NARROW, Scale, drawing, line, rectangle, text


@dataclass(frozen=True)
class Bar:
    """One quantity: its name, pruned over dense, and both as they are written."""

    label: str
    share: float
    dense: str
    pruned: str


def bar_chart(bars: Sequence[Bar], width: int) -> Markup:
    """Draw a bar each, with a line where the dense model is.

    Args:
        bars: from the top.
        width: of the drawing, in pixels.
    """
    narrow = width <= NARROW
    row = 42 if narrow else 28
    left = 0.0 if narrow else 190.0
    right = width - (50.0 if narrow else 230.0)
    scale = Scale(0.0, max(1.0, *(bar.share for bar in bars)), left, right)
    top = FONT + 10.0
    height = top + row * len(bars) + 2
    drawn = []
    for index, bar in enumerate(bars):
        y = top + index * row
        both = f"{bar.dense} → {bar.pruned}"
        if narrow:
            drawn.append(text(0, y + FONT, bar.label))
            drawn.append(text(width, y + FONT, both, "end", "label"))
            y += FONT + 6
        else:
            drawn.append(text(left - 12, y + 14, bar.label, "end"))
            drawn.append(text(width, y + 14, both, "end", "label"))
        drawn.append(rectangle(left, y + 3, scale(bar.share) - left, 15, "pruned"))
        # Across the bars only: on a narrow page the figures stand between them.
        drawn.append(line(scale(1.0), y, scale(1.0), y + 21, "level"))
        drawn.append(
            text(scale(max(bar.share, 0)) + 6, y + 15, f"{bar.share:.0%}", "start", "tick halo")
        )
    drawn.append(
        text(scale(1.0), FONT - 2, "dense = 100%", "middle" if not narrow else "end", "label")
    )
    said = "; ".join(f"{bar.label}: {bar.share:.0%}, {bar.dense} to {bar.pruned}" for bar in bars)
    return drawing(width, height, f"Pruned over dense. {said}.", *drawn)
