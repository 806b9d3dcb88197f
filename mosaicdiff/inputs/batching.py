"""How many rows go through a model at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..machine import free_bytes

#: Rows tried first, and the most.
MOST_ROWS = 64
#: On the CPU: activations may take this share of what is free; a call holds about so many of its
#: largest at once (input, output, and the queries, keys and values beside them).
_SHARE, _HELD = 0.25, 8


def halving(
    run: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, size: int
) -> Iterator[torch.Tensor]:
    """Run a function over rows in batches, halving them where a GPU's memory does not do.

    Raises:
        torch.OutOfMemoryError: one row alone does not fit.
    """
    start = 0
    while start < len(rows):
        part = rows[start : start + size]
        try:
            done = run(part)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = max(1, min(size, len(part)) // 2)
            _empty_cache()
            continue
        start += len(part)
        yield done


def fitting_rows(call: Callable[[int], Any], device: torch.device, module: nn.Module) -> int:
    """Choose how many rows of a model's calls fit into memory: a power of two, at most 64.

    On a GPU by trial: 64 rows, halved until a call goes through, and once more where that took
    more than four fifths of what was free. On the CPU by a rule: one row is run, and eight times
    its largest activation for each row may take a quarter of the memory that is free.

    Args:
        call: makes one call with so many rows.
        device: where it runs.
        module: that runs.

    Raises:
        torch.OutOfMemoryError: one row alone does not fit.
    """
    if device.type != "cuda":
        largest = _largest_activation(call, module)
        free = free_bytes(device)
        rows = MOST_ROWS
        while rows > 1 and rows * _HELD * largest > _SHARE * free:
            rows //= 2
        return rows
    rows = MOST_ROWS
    while True:
        torch.cuda.empty_cache()
        free = free_bytes(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            call(rows)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
            continue
        taken = torch.cuda.max_memory_allocated(device) - before
        _empty_cache()
        # Statistics and solving want some too.
        return rows if taken <= 0.8 * free or rows == 1 else rows // 2


def _largest_activation(call: Callable[[int], Any], module: nn.Module) -> int:
    """Return the bytes of the largest input or output of a submodule in a call of one row."""
    largest = 0

    def look(submodule: nn.Module, args: tuple, output: Any) -> None:
        nonlocal largest
        for value in (*args, *(output if isinstance(output, tuple) else (output,))):
            if torch.is_tensor(value):
                largest = max(largest, value.numel() * value.element_size())

    with ExitStack() as stack:
        for submodule in module.modules():
            stack.callback(submodule.register_forward_hook(look).remove)
        call(1)
    return largest


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
