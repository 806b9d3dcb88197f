"""What calibration measured, for every bin of the trajectory, whatever is done with it later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..groups import PrunableLayer
from ..solving.curves import RemovalCurve
from ..trajectory.stages import Division
from .bank import Statistics


@dataclass(frozen=True)
class PackedStatistics:
    """Statistics of one reader with half of the symmetric H, on the CPU.

    Args:
        hessian: see `pack_symmetric`.
        mean: E[x], (n,).
        weight: total weight of the tokens seen.
    """

    hessian: torch.Tensor
    mean: torch.Tensor
    weight: float

    @classmethod
    def pack(cls, statistics: Statistics) -> PackedStatistics:
        """Keep what `unpack` needs, on the CPU."""
        return cls(
            pack_symmetric(statistics.hessian).cpu(), statistics.mean.cpu(), statistics.weight
        )

    def unpack(self, device: torch.device) -> Statistics:
        """Return the statistics with the whole H, bit for bit, on a device."""
        hessian = unpack_symmetric(self.hessian.to(device), len(self.mean))
        return Statistics(hessian, self.mean.to(device), self.weight)


def pack_symmetric(matrix: torch.Tensor) -> torch.Tensor:
    """Store the lower triangle of (n, n) without gaps, (n + 1, n / 2) for even n.

    The left half of the columns keeps its triangle one row down; what that leaves free at the
    top takes the transpose of the right half's triangle (the rectangular full packed format of
    Gustavson et al., 2010). An odd n is padded by one.
    """
    n = len(matrix)
    if n % 2:
        matrix = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
    half = len(matrix) // 2
    packed = matrix.new_zeros(len(matrix) + 1, half)
    packed[1:] = matrix[:, :half].tril()
    packed[:half] += matrix[half:, half:].tril().T
    return packed


def unpack_symmetric(packed: torch.Tensor, n: int) -> torch.Tensor:
    """Return the symmetric (n, n) that `pack_symmetric` stored."""
    half = packed.shape[1]
    matrix = packed.new_zeros(2 * half, 2 * half)
    matrix[:, :half] = packed[1:].tril()
    matrix[half:, half:] = packed[:half].triu().T
    matrix += matrix.tril(-1).T
    return matrix[:n, :n].contiguous()


def packed_bytes(layers: Sequence[PrunableLayer], bins: int) -> int:
    """Return the bytes that the statistics of so many bins take, on disk and in memory."""
    total = 0
    for layer in layers:
        n = layer.groups * layer.width
        even = n + n % 2
        total += 4 * ((even + 1) * (even // 2) + n) * len(layer.readers)
    return bins * total


@dataclass(frozen=True)
class Calibration:
    """Second-order statistics of every reader in every bin of the trajectory.

    A bin is a stage, or a part of one: `merged` joins neighbouring bins exactly.

    Args:
        division: the bins, noisiest first.
        steps: sampling steps of each bin, of the plan.
        layers: of the denoiser.
        power: P, the mean square of the clean latents.
        statistics: for each bin, of each reader by name.
        made_for: what the statistics depend on; another model or other settings refuse them.
        weights: by weighting (`sensitivity`, `trajectory`), where it was measured: for each bin,
            by reader, how much an error of its output counts.
        changes: for each bin, by layer or block name: what dropping it changes (see
            `statistics.depth`), where it was measured.
        curves: for each bin, by layer name, where they were traced; `traced_with` says how.
        weighted: whether bins are joined by the weight of what they saw (sampled trajectories)
            and not by their sampling steps (as many samples in each).
    """

    division: Division
    steps: tuple[int, ...]
    layers: tuple[PrunableLayer, ...]
    power: float
    statistics: Sequence[Mapping[str, PackedStatistics]]
    made_for: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    changes: Sequence[Mapping[str, Mapping[str, float]]] | None = None
    curves: Sequence[Mapping[str, RemovalCurve]] | None = None
    traced_with: Mapping[str, Any] = field(default_factory=dict)
    weighted: bool = False

    def merged(self, groups: Sequence[Sequence[int]], division: Division) -> Calibration:
        """Join runs of neighbouring bins into the stages of a coarser division.

        H of a stage is the mean of its bins', each by its share of the sampling steps, or of the
        weight where they are weighted.

        Args:
            groups: the bins of each stage.
            division: of the stages.
        """
        if [list(group) for group in groups] == [[k] for k in range(len(self.steps))]:
            return replace(self, division=division)
        return replace(
            self,
            division=division,
            steps=tuple(sum(self.steps[k] for k in group) for group in groups),
            statistics=[_LazyMerge(self, tuple(group)) for group in groups],
            weights={
                kind: [self._mean_of(rows, group) for group in groups]
                for kind, rows in self.weights.items()
            },
            changes=None if self.changes is None else [self._changes_of(g) for g in groups],
            curves=None,
        )

    def _shares(self, group: Sequence[int]) -> list[float]:
        total = sum(self.steps[k] for k in group)
        return [self.steps[k] / total for k in group]

    def _mean_of(
        self, rows: Sequence[Mapping[str, float]], group: Sequence[int]
    ) -> dict[str, float]:
        return _mean_rows([rows[k] for k in group], self._shares(group))

    def _changes_of(self, group: Sequence[int]) -> dict[str, dict[str, float]]:
        rows = [(self.changes or [])[k] for k in group]
        return {
            name: _mean_rows([row[name] for row in rows], self._shares(group)) for name in rows[0]
        }

    def pooled(self, reader: str, device: torch.device) -> Statistics:
        """Return a reader's statistics over the whole trajectory."""
        parts = [bin_[reader] for bin_ in self.statistics]
        return merge_statistics(parts, self._shares_of(parts, range(len(parts))), device)

    def _shares_of(self, parts: Sequence[PackedStatistics], group: Sequence[int]) -> list[float]:
        """Return by what shares the statistics of some bins are joined."""
        if not self.weighted:
            return self._shares(group)
        total = sum(part.weight for part in parts)
        return [part.weight / total for part in parts]


def _mean_rows(rows: Sequence[Mapping[str, float]], shares: Sequence[float]) -> dict[str, float]:
    return {
        name: sum(share * row[name] for share, row in zip(shares, rows, strict=True))
        for name in rows[0]
    }


def merge_statistics(
    parts: Sequence[PackedStatistics], shares: Sequence[float], device: torch.device
) -> Statistics:
    """Average the statistics of several bins of one reader, by shares that sum to 1."""
    hessian, mean = parts[0].hessian * shares[0], parts[0].mean * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        hessian.add_(part.hessian, alpha=share)
        mean.add_(part.mean, alpha=share)
    weight = sum(part.weight for part in parts)
    return PackedStatistics(hessian, mean, weight).unpack(device)


class _LazyMerge(Mapping[str, PackedStatistics]):
    """The statistics of joined bins, averaged when asked for: they need no memory before."""

    def __init__(self, calibration: Calibration, group: tuple[int, ...]) -> None:
        self._parts = [calibration.statistics[k] for k in group]
        self._calibration, self._group = calibration, group

    def __getitem__(self, reader: str) -> PackedStatistics:
        parts = [part[reader] for part in self._parts]
        if len(parts) == 1:
            return parts[0]
        shares = self._calibration._shares_of(parts, self._group)
        return PackedStatistics.pack(merge_statistics(parts, shares, torch.device("cpu")))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0])

    def __len__(self) -> int:
        return len(self._parts[0])
