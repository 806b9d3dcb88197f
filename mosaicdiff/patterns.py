"""Patterns of module names: which layers or linears are meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern (`*` and `?`) names a module or one above it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def is_chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Tell whether a module may be pruned: included (by default) and not excluded."""
    if any(matches(name, pattern) for pattern in exclude):
        return False
    return not include or any(matches(name, pattern) for pattern in include)


def check_patterns(names: Sequence[str], patterns: Iterable[str], option: str) -> None:
    """Refuse a pattern that names nothing.

    Args:
        names: of all that there is.
        patterns: to look at.
        option: where they were given, for the message.

    Raises:
        ValueError: as said.
    """
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            above = names[0].rpartition(".")[0]
            raise ValueError(
                f"prune: {option} must name layers of the denoiser, but nothing matches "
                f"{pattern!r}. The first is {names[0]!r}; {above!r} means all that is in it."
            )
