"""Draw bars made of parts: where the time of a call goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Markup, element
from .svg import FONT, NARROW, Scale, drawing, element_title, rectangle, text

#: Classes of the parts, in order.
PART_CLASSES = ("part-0", "part-1", "part-2", "part-3", "part-4")


@dataclass(frozen=True)
class SpentBar:
    """One bar: its name, and the length of each part in milliseconds."""

    label: str
    parts: Sequence[float]


def spent_chart(bars: Sequence[SpentBar], names: Sequence[str], width: int) -> Markup:
    """Draw a bar each, as long as the time it stands for.

    Args:
        bars: from the top.
        names: of the parts.
        width: of the drawing, in pixels.
    """
    narrow = width <= NARROW
    row = 40 if narrow else 27
    left = 0.0 if narrow else 130.0
    scale = Scale(0.0, max(sum(bar.parts) for bar in bars), left, width - 76.0)
    drawn = []
    for index, bar in enumerate(bars):
        y = float(index * row)
        if narrow:
            drawn.append(text(0, y + FONT, bar.label))
            y += FONT + 4
        else:
            drawn.append(text(left - 12, y + 15, bar.label, "end"))
        start = 0.0
        for name, value, style in zip(names, bar.parts, PART_CLASSES, strict=True):
            x = scale(start)
            drawn.append(
                element(
                    "g",
                    element_title(f"{bar.label}: {name} {value:.2f} ms"),
                    rectangle(x, y + 3, scale(start + value) - x, 16, style),
                )
            )
            start += value
        drawn.append(text(scale(start) + 6, y + 15, f"{start:.2f} ms", "start", "tick"))
    said = "; ".join(
        f"{bar.label} {sum(bar.parts):.2f} ms, of it "
        + ", ".join(f"{name} {value:.2f}" for name, value in zip(names, bar.parts, strict=True))
        for bar in bars
    )
    return drawing(width, row * len(bars) + 4, f"Where the time of a call goes. {said}.", *drawn)
