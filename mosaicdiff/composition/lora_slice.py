"""Which rows and columns of a dense linear a stage keeps: what a LoRA is sliced by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..groups import Piece, PrunableLayer


@dataclass(frozen=True)
class LoraPair:
    """A low-rank change of one linear or convolution: scale * up @ down.

    Args:
        module: its name in the dense denoiser.
        down: (rank, n) of a linear; (rank, n, kh, kw) of a convolution.
        up: (m, rank); (m, rank, 1, 1).
        scale: alpha over rank.
    """

    module: str
    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def change(self, dtype: torch.dtype) -> torch.Tensor:
        """Return scale * up @ down in the shape of the weight, summed in `dtype`."""
        down, up = self.down.to(dtype), self.up.to(dtype)
        found = self.scale * (up.flatten(1) @ down.flatten(1))
        return found.reshape(len(up), *down.shape[1:])


@dataclass(frozen=True)
class KeptParts:
    """Where what a stage keeps of a weight lies in the dense one; None where that is all.

    Args:
        rows: indices (m',) int64 on the CPU, in the stage's order.
        columns: likewise (n',).
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def slice(self, pair: LoraPair) -> LoraPair:
        """Cut a change of the dense weight down to what is kept of it."""
        up = pair.up if self.rows is None else pair.up[self.rows]
        down = pair.down if self.columns is None else pair.down[:, self.columns]
        return LoraPair(pair.module, down, up, pair.scale)

    def expand(self, pair: LoraPair, shape: Sequence[int]) -> LoraPair:
        """Put a change of what is kept into one of the dense weight, zero elsewhere.

        Args:
            shape: (m, n, ...) of the dense weight.
        """
        up, down = pair.up, pair.down
        if self.rows is not None:
            up = up.new_zeros(shape[0], *up.shape[1:]).index_copy_(0, self.rows, up)
        if self.columns is not None:
            whole = down.new_zeros(down.shape[0], shape[1], *down.shape[2:])
            down = whole.index_copy_(1, self.columns, down)
        return LoraPair(pair.module, down, up, pair.scale)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of what is kept of a dense weight."""
        rows = shape[0] if self.rows is None else len(self.rows)
        columns = shape[1] if self.columns is None else len(self.columns)
        return (rows, columns, *shape[2:])


def kept_parts(
    layers: Iterable[PrunableLayer],
    kept: Mapping[str, torch.Tensor],
    module: str,
    shape: Sequence[int],
) -> KeptParts:
    """Find what a stage keeps of the weight of one linear or convolution.

    Args:
        layers: all of the denoiser.
        kept: groups that the stage keeps, of every layer that is not whole.
        module: name of the linear in the dense denoiser.
        shape: of its dense weight. A depthwise convolution (m, 1, ...) has no columns to lose.
    """
    pieces: tuple[list[tuple[PrunableLayer, Piece]], ...] = ([], [])
    for layer in layers:
        if layer.name in kept:
            for piece in layer.pieces:
                if piece.parameter == f"{module}.weight" and piece.axis is not None:
                    pieces[piece.axis].append((layer, piece))
    rows, columns = (_kept_along(p, kept, shape[axis]) for axis, p in enumerate(pieces))
    return KeptParts(rows, columns)


def _kept_along(
    pieces: Sequence[tuple[PrunableLayer, Piece]], kept: Mapping[str, torch.Tensor], length: int
) -> torch.Tensor | None:
    """Return the indices along one axis that are left, in the stage's order."""
    if not pieces:
        return None
    runs = []
    for layer, piece in pieces:
        groups = kept[layer.name]
        wide = layer.columns_of_groups
        # Within one run: `indices` counts from the run's first index.
        within = layer.indices(Piece("", "", 0, (0,), whole=piece.whole), groups, wide)
        runs += [(start, wide, within + start) for start in piece.starts]
    found, cursor = [], 0
    for start, wide, indices in sorted(runs, key=lambda run: run[0]):
        found += [torch.arange(cursor, start), indices]
        cursor = start + wide
    return torch.cat([*found, torch.arange(cursor, length)])
