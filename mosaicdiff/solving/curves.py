"""What a layer loses by each removal, along a given order. Mathematics only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """The groups of one layer of one stage from the first to go, and what each removal adds.

    Args:
        order: (groups,) int64 on the CPU.
        losses: (readers, groups) float64; their cumulative sum is a reader's squared error,
            summed over its outputs, mean over the calibration tokens. Without compensation a
            loss may be negative.
        damping: of each reader, relative to the mean of its Hessian's diagonal; 0 where none was
            used.
    """

    order: torch.Tensor
    losses: np.ndarray
    damping: tuple[float, ...]

    def errors(self, weights: Sequence[float] | None = None) -> np.ndarray:
        """Return the squared error at every level, 0 to all groups removed, (groups + 1,).

        Args:
            weights: of the readers' errors in the sum; all alike by default.
        """
        weighed = np.ones(len(self.losses)) if weights is None else np.asarray(weights)
        return np.concatenate([[0.0], np.cumsum(weighed @ self.losses)])

    def kept(self, level: int) -> torch.Tensor:
        """Return the sorted groups that are left after the first `level` removals."""
        return self.order[level:].sort().values


def losses_along(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    columns: torch.Tensor,
    width: int,
    *,
    damping: float = 0.0,
    compensated: bool = True,
) -> np.ndarray:
    """Return what each removal of a given order adds to a layer's squared error, in float64.

    With M the upper triangular factor of the damped H in that order, H = M M^T, a removed
    column j leaves of the output what no later column explains: || (W M)_j ||^2 once the later
    ones are refitted. Without refitting, the errors are the partial sums of (W^T W) * H.

    Args:
        weight: (m, n).
        hessian: (n, n), symmetric.
        columns: (n,) all columns, from the first to go.
        width: of a group, whose columns lie together in `columns`.
        damping: share of mean(diag H) that is added to the diagonal.
        compensated: whether what is kept is refitted by least squares.

    Returns:
        (n / width,) float64.

    Raises:
        RuntimeError: the damped H has no Cholesky factor.
    """
    columns = columns.to(hessian.device)
    ordered = hessian.double()[columns][:, columns]
    dead = ordered.diagonal() == 0
    rows = weight.double().to(hessian.device)[:, columns].masked_fill(dead, 0.0)
    if compensated:
        ordered.diagonal().add_(damping * ordered.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(ordered.flip(0, 1))
        if failed:
            raise RuntimeError(
                f"losses_along: hessian must be positive definite with damping {damping:g}, but "
                "has no Cholesky factor. Use more damping or more calibration samples."
            )
        losses = (rows @ factor.flip(0, 1)).square().sum(0)
    else:
        products = (rows.T @ rows).mul_(ordered)
        losses = 2 * products.tril(-1).sum(1) + products.diagonal()
    return losses.reshape(-1, width).sum(1).cpu().numpy()
