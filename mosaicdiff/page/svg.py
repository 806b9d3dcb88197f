"""What the figures share: the frame, text, scales and their ticks.

A figure is drawn twice, for a wide and for a narrow page, because text in a drawing that is
scaled down cannot be read; the style sheet shows one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .markup import Child, Markup, element, join

#: Widths of the two drawings, in CSS pixels at their usual size.
WIDE, NARROW = 860, 340
#: Colours there are for stages; more stages begin again.
STAGE_COLOURS = 6
#: About the width of a character over the size of the font, of a system font.
_CHARACTER = 0.56
FONT = 12


def stage_class(index: int) -> str:
    """Return the class that gives a stage its colour."""
    return f"stage-{index % STAGE_COLOURS}"


def text_width(text: str, size: float = FONT) -> float:
    """Return about how wide a text is, in pixels."""
    return _CHARACTER * size * len(text)


def drawing(width: float, height: float, label: str, *children: Child) -> Markup:
    """Return one SVG.

    Args:
        width: in CSS pixels.
        height: the same.
        label: what there is to see, for those who do not see it.
        children: what is drawn.
    """
    return element(
        "svg",
        *children,
        viewbox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
        class_="wide" if width > NARROW else "narrow",
    )


def both_widths(draw: Callable[[int], Markup]) -> Markup:
    """Draw a figure for a wide and for a narrow page."""
    return join(draw(WIDE), draw(NARROW))


def text(x: float, y: float, value: str, anchor: str = "start", class_: str = "") -> Markup:
    """Return one line of text; `anchor` is start, middle or end."""
    return element("text", value, x=x, y=y, text_anchor=anchor, class_=class_ or None)


def element_title(value: str) -> Markup:
    """Return what a pointer that rests on a group is told."""
    return element("title", value)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rectangle(x: float, y: float, width: float, height: float, class_: str) -> Markup:
    """Return a rectangle."""
    return element("rect", x=x, y=y, width=max(width, 0.0), height=height, class_=class_)


def marker(index: int, x: float, y: float, class_: str, size: float = 3.5) -> Markup:
    """Return a point whose shape tells series apart where colours do not."""
    shape = index % 3
    if shape == 0:
        return element("circle", cx=x, cy=y, r=size, class_=class_)
    if shape == 1:
        return rectangle(x - size, y - size, 2 * size, 2 * size, class_)
    far = 1.3 * size
    path = f"M{x:.1f} {y - far:.1f}L{x + far:.1f} {y + 0.8 * far:.1f}H{x - far:.1f}Z"
    return element("path", d=path, class_=class_)


@dataclass(frozen=True)
class Scale:
    """Map values to pixels, evenly or by their logarithm.

    Args:
        low: value at `start`.
        high: value at `stop`.
        start: pixel.
        stop: pixel.
        logarithmic: by the logarithm; values must be above 0.
    """

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        share = 0.5 if high == low else (value - low) / (high - low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Return about `count` round values in the range; powers of ten where logarithmic."""
        if self.logarithmic:
            lowest = math.ceil(math.log10(self.low) - 1e-9)
            highest = math.floor(math.log10(self.high) + 1e-9)
            apart = max(1, math.ceil((highest - lowest + 1) / count))
            return [10.0**power for power in range(lowest, highest + 1, apart)]
        if self.high == self.low:
            return [self.low]
        step = round_step((self.high - self.low) / max(count - 1, 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{k * step:.10g}") for k in range(first, last + 1)]


def round_step(step: float) -> float:
    """Return the next of 1, 2 and 5 times a power of ten that is not less."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= step * (1 - 1e-9))


def even_range(values: Sequence[float], room: float = 0.06) -> tuple[float, float]:
    """Return the range of values with some room, beginning at 0 where that is near."""
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    if 0 <= low < 0.5 * high:
        return 0.0, high + room * spread
    return low - room * spread, high + room * spread


def decades(values: Sequence[float], most: int = 6) -> tuple[float, float]:
    """Return whole powers of ten around positive values, at most so many decades down."""
    high = 10.0 ** math.ceil(math.log10(max(values)))
    low = 10.0 ** math.floor(math.log10(max(min(values), max(values) * 10.0**-most)))
    return (low, high) if low < high else (high / 10, high)
