"""Errors that say in which batch of a long run they happened."""

from __future__ import annotations

from typing import Any


def in_batch(error: Exception, where: str, number: int, count: int) -> Exception:
    """Return an error like this one that says in which batch it happened, as its `batch` does.

    Args:
        error: what was raised; another of its kind is made, or a RuntimeError where that cannot
            be made from a text.
        where: the public function.
        number: of the batch, from 0.
        count: of batches.
    """
    text = f"{where}: batch {number + 1} of {count} failed: {type(error).__name__}: {error}"
    told: Any
    try:
        told = type(error)(text)
    except Exception:
        told = RuntimeError(text)
    if text not in str(told):
        told = RuntimeError(text)
    told.batch = number + 1
    return told
