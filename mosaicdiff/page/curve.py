"""Draw lines over an axis, with stages behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .markup import Child, Markup, element
from .svg import (
    FONT,
    Scale,
    decades,
    drawing,
    even_range,
    line,
    marker,
    rectangle,
    text,
    text_width,
)


@dataclass(frozen=True)
class Series:
    """Points to join.

    Args:
        label: what it is.
        x: values, in order.
        y: as many; None parts the line.
        style: its class, which gives the colour.
        shape: of the marks (see `svg.marker`); None draws none.
        joined: whether a line joins them.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: str
    shape: int | None = None
    joined: bool = True


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis, named where the name fits; `style` gives its colour."""

    label: str
    first: float
    last: float
    style: str


@dataclass(frozen=True)
class Axes:
    """How the axes are.

    Args:
        x_label: with its unit.
        y_label: the same.
        logarithmic: the y axis.
        reversed_x: larger values on the left.
        x_ticks: where ticks are; None chooses round values.
        write_x: how a tick of the x axis is written.
        write_y: the same of the y axis.
        y_range: low and high; None takes that of the values.
    """

    x_label: str
    y_label: str
    logarithmic: bool = False
    reversed_x: bool = False
    x_ticks: Sequence[float] | None = None
    write_x: Callable[[float], str] = lambda value: f"{value:g}"
    write_y: Callable[[float], str] = lambda value: f"{value:g}"
    y_range: tuple[float, float] | None = None


def line_chart(
    width: float,
    height: float,
    label: str,
    series: Sequence[Series],
    axes: Axes,
    bands: Sequence[Band] = (),
    levels: Sequence[tuple[str, float]] = (),
) -> Markup:
    """Draw series in one frame.

    Args:
        width: of the drawing, in pixels.
        height: the same.
        label: what there is to see, in words.
        series: what is drawn.
        axes: how they are.
        bands: behind the lines.
        levels: named values of y, drawn across.
    """
    return drawing(width, height, label, *chart_parts(width, height, series, axes, bands, levels))


def chart_parts(
    width: float,
    height: float,
    series: Sequence[Series],
    axes: Axes,
    bands: Sequence[Band] = (),
    levels: Sequence[tuple[str, float]] = (),
) -> list[Markup]:
    """Return what `line_chart` draws, to be put beside others."""
    values = [y for one in series for y in one.y if y is not None]
    values += [value for _, value in levels]
    low, high = axes.y_range or (decades if axes.logarithmic else even_range)(values)
    # The y axis's name has the first line to itself, the bands' names the second.
    top, bottom = FONT + 8.0, height - 2.6 * FONT - 6
    room = FONT + 12.0 if bands else 4.0
    y = Scale(low, high, bottom, top + room, axes.logarithmic)
    ticks = y.ticks(7 if axes.logarithmic else 5)
    left = max(text_width(axes.write_y(tick)) for tick in ticks) + 10
    all_x = [x for one in series for x in one.x] + [e for b in bands for e in (b.first, b.last)]
    last = max(text_width(axes.write_x(tick)) for tick in axes.x_ticks or (max(all_x),))
    right = width - max(10.0, last / 2 + 1)
    ends = (left, right)
    x = Scale(min(all_x), max(all_x), *(ends[::-1] if axes.reversed_x else ends))
    parts = [_band(x, band, top, bottom) for band in bands]
    for tick in ticks:
        parts.append(line(left, y(tick), right, y(tick), "grid"))
        parts.append(text(left - 6, y(tick) + 4, axes.write_y(tick), "end", "tick"))
    for tick in axes.x_ticks if axes.x_ticks is not None else x.ticks(6 if width > 400 else 4):
        parts.append(line(x(tick), bottom, x(tick), bottom + 4, "axis"))
        parts.append(text(x(tick), bottom + FONT + 5, axes.write_x(tick), "middle", "tick"))
    parts.append(line(left, bottom, right, bottom, "axis"))
    parts.append(text((left + right) / 2, height - 4, axes.x_label, "middle", "label"))
    parts.append(text(0, FONT - 2, axes.y_label, "start", "label"))
    for name, value in levels:
        parts.append(line(left, y(value), right, y(value), "level"))
        parts.append(text(right - 3, y(value) - 4, name, "end", "label"))
    for one in series:
        parts += _series(one, x, y)
    return parts


def _band(x: Scale, band: Band, top: float, bottom: float) -> Markup:
    left, right = sorted((x(band.first), x(band.last)))
    inner: list[Child] = [rectangle(left, top, right - left, bottom - top, f"band {band.style}")]
    if text_width(band.label, FONT) < right - left:
        inner.append(
            text((left + right) / 2, top + FONT + 3, band.label, "middle", f"name {band.style}")
        )
    return element("g", *inner)


def _series(one: Series, x: Scale, y: Scale) -> list[Markup]:
    parts: list[Markup] = []
    points = [
        (x(a), y(max(b, y.low) if y.logarithmic else b)) if b is not None else None
        for a, b in zip(one.x, one.y, strict=True)
    ]
    if one.joined:
        path, pen_down = [], False
        for point in points:
            if point is None:
                pen_down = False
                continue
            path.append(f"{'L' if pen_down else 'M'}{point[0]:.1f} {point[1]:.1f}")
            pen_down = True
        parts.append(element("path", d="".join(path), class_=f"line {one.style}"))
    if one.shape is not None:
        parts += [marker(one.shape, *point, f"mark {one.style}") for point in points if point]
    return parts
