"""Rows of several tensors as if they were one, which they never become."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Rows:
    """Rows of tensors of one shape, in memory or in files that are mapped into it.

    Args:
        parts: each (B, ...), with the same sizes but for the rows.
    """

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self._parts = tuple(parts)
        counts = torch.tensor([len(part) for part in parts])
        self._ends = counts.cumsum(0)
        self._dtype = parts[0].dtype
        for part in parts[1:]:
            self._dtype = torch.promote_types(self._dtype, part.dtype)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows (N,) by their numbers; only those are read."""
        found = torch.empty((len(rows), *self._parts[0].shape[1:]), dtype=self._dtype)
        owners = torch.bucketize(rows, self._ends, right=True)
        for owner in owners.unique().tolist():
            mine = owners == owner
            part = self._parts[owner]
            start = int(self._ends[owner]) - len(part)
            found[mine] = part[rows[mine] - start].to(self._dtype)
        return found
