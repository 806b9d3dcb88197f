"""Pruning of single weights as published, in plain torch: what the sweep is compared with."""

import torch
from torch import Tensor


def sparsegpt_torch(
    weight: Tensor,
    h: Tensor,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[Tensor, Tensor, float]:
    """Prune the weights of one layer, column by column.

    Written from the description of SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774): invert
    the damped H, take the upper Cholesky factor of the inverse, and walk the columns in blocks.

    Args:
        weight: (m, n), any floating type.
        h: (n, n) float32 or float64.
        sparsity: share of each block's weights to prune; either this or ``pattern``.
        pattern: (keep, of), to keep ``keep`` of every ``of`` weights along a row.
        damping: share of mean(diag H) that is added to the diagonal.
        block_size: columns of a block; with a pattern a multiple of ``of``.

    Returns:
        The (m, n) compensated weights, their mask (True where kept), and the squared error.
    """
    n = h.shape[0]
    w, mask = weight.to(h.dtype).clone(), torch.ones_like(weight, dtype=torch.bool)
    dead = h.diagonal() == 0
    damped = h + torch.diag(damping * h.diagonal().mean() + dead.to(h.dtype))
    w[:, dead] = 0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    u = torch.linalg.cholesky(inverse, upper=True)
    loss = 0.0
    for begin in range(0, n, block_size):
        end = min(begin + block_size, n)
        block, block_u = w[:, begin:end].clone(), u[begin:end, begin:end]
        diagonal = block_u.diagonal()
        kept = mask[:, begin:end]
        if pattern is None:
            scores = (block / diagonal) ** 2
            count = round((sparsity or 0.0) * scores.numel())
            if count:
                kept.copy_(scores > scores.flatten().sort().values[count - 1])
        errors = torch.zeros_like(block)
        for j in range(end - begin):
            if pattern is not None and j % pattern[1] == 0:
                keep, of = pattern
                scores = (block[:, j : j + of] / diagonal[j : j + of]) ** 2
                lost = scores.topk(of - keep, dim=1, largest=False).indices
                kept[:, j : j + of] = torch.ones_like(scores, dtype=torch.bool).scatter_(
                    1, lost, False
                )
            pruned = torch.where(kept[:, j], block[:, j], 0)
            errors[:, j] = (block[:, j] - pruned) / diagonal[j]
            block[:, j:] -= torch.outer(errors[:, j], block_u[j, j:])
            block[:, j] = pruned
        w[:, begin:end] = block
        w[:, end:] -= errors @ u[begin:end, end:]
        loss += float(errors.double().square().sum())
    return w.to(weight.dtype), mask, loss
