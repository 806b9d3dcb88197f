"""Accumulators of second-order statistics, one for each reader."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mosaic_kernels import hessian_finalize_, hessian_update_


@dataclass(frozen=True)
class Statistics:
    """What calibration leaves of a reader's input x.

    Args:
        hessian: H = E[x x^T], (n, n), float32, symmetric.
        mean: E[x], (n,), float32.
        weight: total weight of the tokens seen.
    """

    hessian: torch.Tensor
    mean: torch.Tensor
    weight: float


class HessianBank:
    """Sum w x x^T and w x over calibration tokens; activations are never kept.

    What rounding takes from the sums is kept beside them: a calibration of millions of tokens
    loses nothing, and no second matrix is needed for it.

    Args:
        widths: input features of each reader, by name.
        device: where the sums live.
    """

    def __init__(self, widths: dict[str, int], device: torch.device) -> None:
        self._sums = {
            name: (
                torch.zeros(n, n, dtype=torch.float32, device=device),
                torch.zeros(n, dtype=torch.float32, device=device),
                torch.zeros(2, n, dtype=torch.float32, device=device),
            )
            for name, n in widths.items()
        }
        self._weights = dict.fromkeys(widths, 0.0)

    @staticmethod
    def bytes_needed(widths: dict[str, int]) -> int:
        """Return the bytes that the sums of these readers take."""
        return sum(4 * n * (n + 3) for n in widths.values())

    def update(self, reader: str, x: torch.Tensor, weight: float = 1.0) -> None:
        """Add the tokens of one call, x (..., n), each with the same weight."""
        hessian, total, residual = self._sums[reader]
        tokens = x.detach().reshape(-1, x.shape[-1])
        hessian_update_(hessian, tokens, weight, total, residual)
        self._weights[reader] += weight * tokens.shape[0]

    def finalize(self, reader: str) -> Statistics:
        """Normalise a reader's sums and release them from the bank.

        Raises:
            ValueError: the reader saw no sample, or something that is not finite.
        """
        hessian, total, residual = self._sums.pop(reader)
        weight = self._weights.pop(reader)
        try:
            hessian_finalize_(hessian, weight, total, residual)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"calibration: input of {reader}: {error}") from None
        return Statistics(hessian, total, weight)
