"""The truth: each operator in plain float64 torch, in the order of its formula.

Nothing here is fast, blocked or clever; every faster path is held to these functions.
"""

from collections.abc import Iterable
from fractions import Fraction
from math import floor

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


def fused_choice_ref(losses: list[list[float]]) -> int:
    """Return the position to remove of R readers' losses of the same groups: rank fusion.

    Highest sum of 1 / (60 + rank + 1), exactly; then the least sum of the losses over their sums;
    then the first.
    """
    positions = range(len(losses[0]))
    score = [Fraction(0) for _ in positions]
    share = [0.0 for _ in positions]
    for reader in losses:
        total = sum(reader)
        for rank, i in enumerate(sorted(positions, key=lambda i: reader[i])):
            score[i] += Fraction(1, 60 + rank + 1)
            share[i] += reader[i] / total if total > 0 else 0.0
    return min(positions, key=lambda i: (-score[i], share[i]))


def prune_columns_joint_ref(
    weights: list[Tensor], hs: list[Tensor], group_size: int, count: int, damping: float
) -> tuple[Tensor, Tensor]:
    """Remove groups one by one from all readers, inverting what is left of each H every time.

    Returns:
        order (count,) int64 and losses (R, count) float64.
    """
    wide = [weight.detach().cpu().double().clone() for weight in weights]
    for w, h in zip(wide, hs, strict=True):
        w[:, h.detach().cpu().diagonal() == 0] = 0
    left = list(range(hs[0].shape[0] // group_size))
    order: list[int] = []
    losses = torch.empty(len(hs), count, dtype=torch.float64)
    for step in range(count):
        kept = torch.cat([group_columns(group, group_size) for group in left])
        candidates: list[list[float]] = []
        for w, h in zip(wide, hs, strict=True):
            a = torch.linalg.inv(damped_ref(h, damping)[kept][:, kept])
            fitted = compensate_ref(w, h, kept, damping)
            candidates.append([])
            for i in range(len(left)):
                s = group_columns(i, group_size)
                loss = torch.trace(fitted[:, s] @ torch.linalg.inv(a[s][:, s]) @ fitted[:, s].T)
                candidates[-1].append(float(loss))
        best = fused_choice_ref(candidates)
        losses[:, step] = torch.tensor([reader[best] for reader in candidates], dtype=torch.float64)
        order.append(left.pop(best))
    return torch.tensor(order, dtype=torch.int64), losses


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


def inverse_upper_factor_ref(h: Tensor, damping: float) -> Tensor:
    """Return U, upper, with U^T U = (H + damping * mean(diag H) * I)^-1 of one matrix."""
    return torch.linalg.cholesky(cholesky_inverse_ref(h, damping)).T


def block_count_ref(sparsity: float, dead: Tensor, rows: int, begin: int, end: int) -> int:
    """Return how many weights the columns [begin, end) lose: dead columns, then a share."""
    n = dead.numel()
    rest = max(round(sparsity * rows * n) - rows * int(dead.sum()), 0)
    share = Fraction(rest, int((~dead).sum()))
    before, after = int((~dead[:begin]).sum()), int((~dead[:end]).sum())
    half = Fraction(1, 2)
    lost = floor(share * after + half) - floor(share * before + half)
    return lost + rows * int(dead[begin:end].sum())


def prune_weights_ref(
    weight: Tensor,
    h: Tensor,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    damping: float,
    block_size: int,
) -> tuple[Tensor, Tensor, float]:
    """Prune single weights of one layer, column by column, each error pushed right at once.

    e = W_ij / U_jj; W_ij <- 0; W_ik <- W_ik - e U_jk for k > j; the loss is the sum of e^2.

    Returns:
        (m, n) float64 weights, their mask (True where kept), and the loss.
    """
    w = weight.detach().cpu().double().clone()
    rows, n = w.shape
    dead = h.detach().cpu().diagonal() == 0
    w[:, dead] = 0
    u = inverse_upper_factor_ref(h, damping)
    mask = torch.ones(rows, n, dtype=torch.bool)
    loss = 0.0
    for j in range(n):
        if pattern is None and j % block_size == 0:
            end = min(j + block_size, n)
            scores = w[:, j:end] ** 2 / u.diagonal()[j:end] ** 2
            scores[:, dead[j:end]] = -1
            order = scores.flatten().sort(stable=True).indices
            flat = torch.ones(order.numel(), dtype=torch.bool)
            flat[order[: block_count_ref(sparsity or 0.0, dead, rows, j, end)]] = False
            mask[:, j:end] = flat.view(rows, end - j)
        elif pattern is not None and j % pattern[1] == 0:
            keep, of = pattern
            scores = w[:, j : j + of] ** 2 / u.diagonal()[j : j + of] ** 2
            order = scores.sort(dim=1, stable=True).indices
            for i in range(rows):
                mask[i, j + order[i, : of - keep]] = False
        for i in range(rows):
            if not mask[i, j]:
                error = float(w[i, j] / u[j, j])
                w[i, j:] -= error * u[j, j:]
                w[i, j] = 0
                loss += error**2
    return w, mask, loss
