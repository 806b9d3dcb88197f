"""What goes at once: whole groups of a layer, whole layers, or single weights."""

from __future__ import annotations

import re

#: Heads and neurons; whole attentions and FFNs; both of a block together.
STRUCTURED = ("structured", "layers", "blocks")
#: Single weights; besides, a pattern `N:M`.
UNSTRUCTURED = "unstructured"


def parse_pattern(granularity: str) -> tuple[int, int] | None:
    """Return (N, M) of `N:M`, N weights kept of every M along a row; None for anything else.

    Raises:
        ValueError: N is not at least 1 and below M.
    """
    match = re.fullmatch(r"(\d+):(\d+)", granularity)
    if match is None:
        return None
    keep, of = int(match.group(1)), int(match.group(2))
    if not 1 <= keep < of:
        raise ValueError(
            f"PruneConfig: granularity N:M must have 1 <= N < M, got {granularity!r}. "
            "2:4 keeps two of every four weights."
        )
    return keep, of


def removes_weights(granularity: str) -> bool:
    """Tell whether single weights go, so that layers keep their shape."""
    return granularity == UNSTRUCTURED or parse_pattern(granularity) is not None


def check_granularity(granularity: str) -> None:
    """Refuse what is none.

    Raises:
        ValueError: as said.
    """
    if granularity not in STRUCTURED and not removes_weights(granularity):
        raise ValueError(
            f"PruneConfig: granularity must be one of {', '.join(STRUCTURED)}, {UNSTRUCTURED}, "
            f"or N:M such as 2:4, got {granularity!r}."
        )
