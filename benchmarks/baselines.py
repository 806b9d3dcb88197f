"""The published algorithms, written out from their descriptions: what ours is measured against."""

from __future__ import annotations

import torch
from torch import Tensor


def hessian_upcast_(h: Tensor, x: Tensor, weight: float) -> None:
    """Add weight * X^T X as OBS-Diff and SparseGPT do: an upcast copy, a scaled one, a product."""
    wide = x.float()
    scaled = wide.mul(weight**0.5)
    h += scaled.T @ scaled


def hessian_mm_(h: Tensor, x: Tensor, weight: float) -> None:
    """Add weight * X^T X by one whole product with float32 sums."""
    if x.dtype == torch.float32:
        h.addmm_(x.T, x, alpha=weight)
    elif x.is_cuda:
        h.add_(torch.mm(x.T, x, out_dtype=torch.float32), alpha=weight)
    else:
        wide = x.float()
        h.addmm_(wide.T, wide, alpha=weight)


def inverse_by_torch(h: Tensor) -> Tensor:
    """Invert a batch of damped matrices one by one: Cholesky factor, then inverse."""
    return torch.stack([torch.cholesky_inverse(torch.linalg.cholesky(m)) for m in h])


def damped(h: Tensor, damping: float = 0.01) -> Tensor:
    """Return H + damping * mean(diag H) * I."""
    result = h.clone()
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    result.diagonal(dim1=-2, dim2=-1).add_(damping * mean)
    return result


def round_sizes(count: int, rounds: int, smallest: int = 8) -> list[int]:
    """Split ``count`` removals into rounds that shrink geometrically to about ``smallest``.

    SlimGPT starts with large groups of columns and ends with small ones (its dynamic group size);
    the sequence of sizes here is ours.
    """
    rounds = max(1, min(rounds, count // smallest))
    low, high = 0.0, 1.0
    for _ in range(60):  # the ratio r with smallest * (1 + 1/r + ...) = count
        ratio = (low + high) / 2
        total = sum(smallest * ratio**-i for i in range(rounds))
        low, high = (ratio, high) if total > count else (low, ratio)
    bounds = [0.0]
    for i in reversed(range(rounds)):
        bounds.append(bounds[-1] + smallest * high**-i)
    scaled = [round(b * count / bounds[-1]) for b in bounds]
    return [b - a for a, b in zip(scaled[:-1], scaled[1:], strict=True) if b > a]


def reinversion(
    weight: Tensor,
    h: Tensor,
    count: int,
    rounds: int = 16,
    damping: float = 0.01,
    group_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Remove ``count`` groups of columns in rounds, inverting H of what is left again in each.

    Structured OBS of OBS-Diff (arXiv 2510.06751), which follows SlimGPT: in a round the columns of
    least ||W_j||^2 / A_jj go together, W <- W - W_S (A_SS)^-1 A_S:. Wider groups (heads), of least
    trace(W_S (A_SS)^-1 W_S^T), go one a round.

    Args:
        weight: (m, n).
        h: (n, n), not damped.
        count: groups to remove.
        rounds: inversions, for single columns.
        damping: share of mean(diag H).
        group_size: columns of a group.

    Returns:
        The columns that are left, ascending, int64, and their weights.
    """
    w, left = weight.clone(), torch.arange(h.shape[0], device=h.device)
    hessian = damped(h, damping)
    for size in round_sizes(count, rounds) if group_size == 1 else [1] * count:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        worst = _group_losses(w, inverse, group_size).argsort()[:size]
        offsets = torch.arange(group_size, device=h.device)
        gone = (worst[:, None] * group_size + offsets).flatten()
        block = inverse.index_select(0, gone)
        w -= w[:, gone] @ torch.linalg.solve(block[:, gone], block)
        alive = torch.ones(left.shape, dtype=torch.bool, device=h.device)
        alive[gone] = False
        w, left = w[:, alive], left[alive]
        hessian = hessian[alive][:, alive]
    return left, w


def _group_losses(w: Tensor, inverse: Tensor, group_size: int) -> Tensor:
    if group_size == 1:
        return w.square().sum(0) / inverse.diagonal()
    blocks = w.unflatten(1, (-1, group_size)).movedim(1, 0)  # (groups, m, g)
    n = inverse.shape[0] // group_size
    own = inverse.reshape(n, group_size, n, group_size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return (torch.linalg.solve(own, blocks.mT) * blocks.mT).sum((1, 2))


def one_shot_mask(
    weight: Tensor, h: Tensor, count: int, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Remove the ``count`` columns of least ||W_j||^2 / A_jj at once, without compensation."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(h, damping)))
    loss = weight.square().sum(0) / inverse.diagonal()
    kept = loss.argsort()[count:].sort().values
    return kept, weight[:, kept]
