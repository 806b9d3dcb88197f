"""Accumulators of second-order statistics, one for each reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from mosaic_kernels import hessian_finalize_, hessian_update_

from ..distributed import World


@dataclass(frozen=True)
class Statistics:
    """What calibration leaves of a reader's input x.

    Args:
        hessian: H = E[x x^T], (n, n), symmetric, float32 (float64 of a float64 denoiser).
        mean: E[x], (n,), in the same type.
        weight: total weight of the tokens seen.
    """

    hessian: torch.Tensor
    mean: torch.Tensor
    weight: float

    def in_float32(self) -> Statistics:
        """Return these in float32, in which layers are solved."""
        return replace(self, hessian=self.hessian.float(), mean=self.mean.float())


#: What a bank holds of a reader: H (n, n), the sum of x (n,), and what rounding took (2, n).
_Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class BankSnapshot:
    """What a bank held: copies of its sums, in main memory, and its weights."""

    sums: dict[str, _Sums]
    weights: dict[str, float]


class HessianBank:
    """Sum w x x^T and w x over calibration tokens; activations are never kept.

    What rounding takes from the sums is kept beside them: a calibration of millions of tokens
    loses nothing, and no second matrix is needed for it. Sums are float32; float64 where the
    activations are, on the CPU.

    Args:
        widths: input features of each reader, by name.
        device: where the sums live. By default where a reader's first input is: with offloading
            that is not where its parameters rest.
    """

    def __init__(self, widths: Mapping[str, int], device: torch.device | None = None) -> None:
        self._widths, self._device = dict(widths), device
        self._sums: dict[str, _Sums] = {}
        self._weights: dict[str, float] = {}

    @staticmethod
    def bytes_needed(widths: Mapping[str, int]) -> int:
        """Return the bytes that the sums of these readers take."""
        return sum(4 * n * (n + 3) for n in widths.values())

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take now."""
        return sum(
            part.numel() * part.element_size() for row in self._sums.values() for part in row
        )

    def add_up(self, world: World, device: torch.device) -> None:
        """Add the sums of all processes together, so that each holds those of all samples.

        Args:
            world: the processes; each must call this.
            device: where sums start that this process saw nothing of.
        """
        if world.size == 1:
            return
        for reader in sorted(self._widths):
            started = self._sums.get(reader)
            wide = world.any(started is not None and started[0].dtype == torch.float64)
            if not world.any(started is not None):
                continue  # nobody saw it: `finalize` says so
            if started is None:
                dtype = torch.float64 if wide else torch.float32
                started = self._start(reader, torch.empty(0, dtype=dtype, device=device))
            for part in started:
                world.sum_(part)
            weight = torch.tensor(self._weights[reader], dtype=torch.float64)
            world.sum_(weight)
            self._weights[reader] = float(weight)

    def update(self, reader: str, x: torch.Tensor, weight: float = 1.0) -> None:
        """Add the tokens of one call, x (..., n), each with the same weight."""
        hessian, total, residual = self._sums.get(reader) or self._start(reader, x)
        tokens = x.detach().reshape(-1, x.shape[-1])
        hessian_update_(hessian, tokens, weight, total, residual)
        self._weights[reader] += weight * tokens.shape[0]

    def _start(self, reader: str, x: torch.Tensor) -> _Sums:
        n, device = self._widths[reader], self._device or x.device
        wide = x.dtype == torch.float64 and device.type == "cpu"
        hessian = torch.zeros(n, n, dtype=torch.float64 if wide else torch.float32, device=device)
        sums = hessian, hessian.new_zeros(n), hessian.new_zeros(2, n)
        self._sums[reader], self._weights[reader] = sums, 0.0
        return sums

    def snapshot(self, into: BankSnapshot | None = None) -> BankSnapshot:
        """Copy all sums into main memory, whole: H's upper triangle holds what rounding took.

        Args:
            into: an earlier snapshot of this bank, whose memory is used again.
        """
        had = {} if into is None else into.sums
        sums = {}
        for reader, row in self._sums.items():
            if reader not in had:
                hessian, total, residual = (part.to("cpu", copy=True) for part in row)
                sums[reader] = hessian, total, residual
                continue
            for kept, part in zip(had[reader], row, strict=True):
                kept.copy_(part)
            sums[reader] = had[reader]
        return BankSnapshot(sums, dict(self._weights))

    def restore(self, snapshot: BankSnapshot) -> None:
        """Take the sums back to what they were, bit for bit; readers new since then are gone."""
        for reader in list(self._sums):
            if reader not in snapshot.sums:
                del self._sums[reader]
                continue
            for part, kept in zip(self._sums[reader], snapshot.sums[reader], strict=True):
                part.copy_(kept)
        self._weights = dict(snapshot.weights)

    def finalize(self, reader: str) -> Statistics:
        """Normalise a reader's sums and release them from the bank.

        Raises:
            ValueError: the reader saw no sample, or something that is not finite.
        """
        if reader not in self._sums:
            raise ValueError(
                f"calibration: input of {reader}: no sample was seen. "
                "Check that the calibration inputs reach this layer."
            )
        hessian, total, residual = self._sums.pop(reader)
        weight = self._weights.pop(reader)
        try:
            hessian_finalize_(hessian, weight, total, residual)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"calibration: input of {reader}: {error}") from None
        return Statistics(hessian, total, weight)
