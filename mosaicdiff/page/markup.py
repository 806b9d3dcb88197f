"""Build HTML and SVG from values: whatever is not markup already is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

#: Elements that have no content and no end.
_VOID = frozenset({"br", "img", "input", "meta"})


class Markup(str):
    """Text that is markup, and goes into a page as it is."""

    __slots__ = ()


#: What an element may hold; None is left out.
Child = str | int | float | None | Iterable["Child"]


def element(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """Return one element; text in it is escaped, so that no value can become markup.

    Args:
        tag: its name.
        children: markup, text, numbers, or any number of those.
        attributes: an underscore at the end is dropped (`class_`), others become hyphens; True
            gives the bare name, None and False leave it out.

    Raises:
        ValueError: children are given to an element that has no content.
    """
    pairs = []
    for name, value in attributes.items():
        key = name.rstrip("_").replace("_", "-")
        # SVG is the one place where names have capitals.
        key = "viewBox" if key == "viewbox" else key
        if value is True:
            pairs.append(f" {key}")
        elif value is not None and value is not False:
            pairs.append(f' {key}="{escape(number(value), quote=True)}"')
    head = f"<{tag}{''.join(pairs)}>"
    inner = join(*children)
    if tag in _VOID:
        if inner:
            raise ValueError(f"element: {tag} must have no children, got {inner[:40]!r}.")
        return Markup(head)
    return Markup(f"{head}{inner}</{tag}>")


def join(*children: Child) -> Markup:
    """Return children one after another, text escaped."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(str(child))
        elif isinstance(child, (str, int, float)):
            parts.append(escape(number(child), quote=False))
        else:
            parts.append(str(join(*child)))
    return Markup("".join(parts))


def number(value: str | int | float) -> str:
    """Return text as it is, and a float in at most two decimals: a hundredth of a pixel."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)


def coded(text: str) -> list[Markup | str]:
    """Return text in which what stands between backticks is code."""
    parts = text.split("`")
    return [element("code", part) if i % 2 else part for i, part in enumerate(parts)]
