"""The truth: each operator in plain float64 torch, in the order of its formula.

Nothing here is fast, blocked or clever; every faster path is held to these functions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def hessian_ref(
    batches: Iterable[tuple[Tensor, float | Tensor]], columns: int
) -> tuple[Tensor, Tensor, float]:
    """Return (H, sum of x, total weight) of weighted batches: H = sum of weight * X^T X.

    Args:
        batches: pairs of (tokens, n) activations and the weight of each of their tokens, or
            (samples,) weights of runs of equally many tokens.
        columns: n.
    """
    h = torch.zeros(columns, columns, dtype=torch.float64)
    sum_x = torch.zeros(columns, dtype=torch.float64)
    total = 0.0
    for x, weight in batches:
        wide = x.detach().cpu().double()
        weights = torch.as_tensor(weight, dtype=torch.float64).reshape(-1, 1)
        factor = weights.repeat_interleave(len(wide) // len(weights), 0)
        h += wide.T @ (factor * wide)
        sum_x += (factor * wide).sum(0)
        total += float(factor.sum())
    return h, sum_x, total


def damped_ref(h: Tensor, damping: float) -> Tensor:
    """Return H + damping * mean(diag H) * I in float64."""
    wide = h.detach().cpu().double()
    return wide + damping * wide.diagonal().mean() * torch.eye(wide.shape[0], dtype=torch.float64)


def cholesky_inverse_ref(h: Tensor, damping: float) -> Tensor:
    """Return (H + damping * mean(diag H) * I)^-1 of one matrix."""
    return torch.linalg.inv(damped_ref(h, damping))


def group_columns(group: int, group_size: int) -> Tensor:
    """Return the column indices of a group."""
    return torch.arange(group * group_size, (group + 1) * group_size)


def prune_columns_ref(
    weight: Tensor, h: Tensor, group_size: int, count: int, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Remove groups one by one from one layer, with the updates of W and A written out.

    loss(S) = trace(W_S (A_SS)^-1 W_S^T); W <- W - W_S (A_SS)^-1 A_S:;
    A <- A - A_:S (A_SS)^-1 A_S:.

    Returns:
        order (count,) int64, losses (count,) float64, and the compensated (m, n) weights.
    """
    w = weight.detach().cpu().double().clone()
    w[:, h.detach().cpu().diagonal() == 0] = 0
    a = cholesky_inverse_ref(h, damping)
    left = list(range(h.shape[0] // group_size))
    order, losses = [], []
    for _ in range(count):
        candidates = []
        for group in left:
            s = group_columns(group, group_size)
            candidates.append(torch.trace(w[:, s] @ torch.linalg.inv(a[s][:, s]) @ w[:, s].T))
        best = min(range(len(left)), key=lambda i: float(candidates[i]))
        s = group_columns(left[best], group_size)
        step = torch.linalg.inv(a[s][:, s]) @ a[s]
        w = w - w[:, s] @ step
        a = a - a[:, s] @ step
        losses.append(candidates[best])
        order.append(left.pop(best))
    return (
        torch.tensor(order, dtype=torch.int64),
        torch.stack(losses) if losses else torch.empty(0, dtype=torch.float64),
        w,
    )


def compensate_ref(weight: Tensor, h: Tensor, kept: Tensor, damping: float) -> Tensor:
    """Return (W H_:R) (H_RR)^-1 for the kept columns R of the damped H."""
    damped = damped_ref(h, damping)
    r = kept.detach().cpu()
    return weight.detach().cpu().double() @ damped[:, r] @ torch.linalg.inv(damped[r][:, r])


def layer_error_ref(
    weight: Tensor, compensated: Tensor, h: Tensor, kept: Tensor, damping: float
) -> float:
    """Return ||(W - W') L||_F^2 for the damped H = L L^T, W' zero outside the kept columns."""
    difference = weight.detach().cpu().double().clone()
    difference[:, kept.cpu()] -= compensated.detach().cpu().double()
    return float(torch.trace(difference @ damped_ref(h, damping) @ difference.T))
