"""Unstructured and N:M pruning of a layer's weights by a sweep over its columns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mosaic_kernels import _checks, _damping, _walk
from mosaic_kernels._inverse_batched import inverse_factors
from mosaic_kernels._precision import full_precision


@dataclass(frozen=True, eq=False)
class Sweep:
    """A layer, or a batch of layers, with single weights pruned and the others compensated.

    Args:
        weight: (B, m, n) or (m, n), as the weights that were given; zero where pruned.
        mask: bool of the same shape, True where a weight is kept.
        losses: (B,) float64, the squared error ||(W - W') L||_F^2 of each layer under the damped
            H = L L^T; (1,) for a single layer.
        damping: (B,) float64 on the CPU, the damping that was used; (1,) for a single layer.
    """

    weight: Tensor
    mask: Tensor
    losses: Tensor
    damping: Tensor


def prune_weights(
    weight: Tensor,
    h: Tensor,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    block_size: int = 128,
) -> Sweep:
    """Set single weights to zero, by share or by pattern, and let the others make up for it.

    With H^-1 = U^T U of the damped H, U upper, the columns are walked from left to right. Where
    W_ij is pruned, e = W_ij / U_jj, W_ij <- 0 and W_ik <- W_ik - e U_jk for k > j; that adds e^2
    to the layer's squared error. Every block of columns loses its share of least W_ij^2 / U_jj^2,
    or every group of consecutive weights along a row all but the largest, chosen when the walk
    reaches the block or the group, from weights that are compensated up to there. Ties go to the
    lowest row, then column.

    Columns that never fired (H_jj = 0) are set to zero before the walk, at no loss, and they are
    the first to be pruned: all of them count towards the sparsity, the rest of it is shared by
    the live columns, and a layer is sparser than asked only where its dead columns alone are more
    than that. With a pattern a group always keeps its number: of dead columns, as zeros, where
    it has no others.

    Weights keep their shape: this saves no dense time by itself. Works in the type of ``h``;
    about n^3 / 3 + m n^2 / 2 multiply-adds, and 3 matrices H and 3 W of memory. The inputs are
    not modified.

    Args:
        weight: (B, m, n) or (m, n), any floating type; a batch holds layers of one shape.
        h: (B, n, n) or (n, n) float32 or float64, symmetric, as ``hessian_finalize_`` left it.
        sparsity: share of the weights to prune, at least 0 and below 1; exact to rounding. Either
            this or ``pattern``.
        pattern: (keep, of), to keep ``keep`` of every ``of`` consecutive weights along a row,
            such as (2, 4); ``of`` divides n.
        damping: share of mean(diag H) that is added to the diagonal, see ``cholesky_inverse``.
        block_size: columns that share a choice; with a pattern it only sets the speed, and is
            rounded to whole groups.

    Returns:
        The compensated weights, their mask, the loss and the damping used.

    Raises:
        ValueError: an argument is not as described, not finite, or a layer's H is all zero.
        RuntimeError: H has no Cholesky factor at any damping, or the compensated weights or
            their loss are beyond the range of the type of ``weight`` or ``h``.

    Source: SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774), as in OBS-Diff (arXiv
    2510.06751).
    """
    name = "prune_weights"
    _checks.require_layer(name, weight, h, (2, 3))
    weight, h = weight.detach(), h.detach()
    n = h.shape[-1]
    keep, of = _check_target(name, n, sparsity, pattern)
    _checks.require_damping(name, damping)
    _checks.require(block_size >= 1, name, "block_size", "at least 1", block_size, "128 is usual.")
    if of:
        block_size = max(block_size // of, 1) * of
    batch_h = h if h.dim() == 3 else h.unsqueeze(0)
    batch_weight = weight if h.dim() == 3 else weight.unsqueeze(0)
    factor, used = _factor_op(batch_h, float(damping), _damping.MAX_DAMPING)
    _damping.require_factor(name, used, _damping.MAX_DAMPING)
    dead = batch_h.diagonal(dim1=-2, dim2=-1) == 0
    if of:
        counts = torch.empty(0, h.shape[0] if h.dim() == 3 else 1, dtype=torch.int64)
    else:
        counts = _counts(float(sparsity or 0), dead.cpu(), weight.shape[-2], block_size)
    work = batch_weight.to(h.dtype).masked_fill(dead[:, None, :], 0)
    pruned, mask, losses = _sweep_op(work, factor, dead, counts.to(h.device), keep, of, block_size)
    result = pruned.to(weight.dtype)
    _require_finite(name, result, losses)
    if h.dim() == 2:
        result, mask = result[0], mask[0]
    return Sweep(result, mask, losses, used)


def _check_target(
    name: str, n: int, sparsity: float | None, pattern: tuple[int, int] | None
) -> tuple[int, int]:
    """Return (keep, of) of the pattern, (0, 0) where the sparsity is asked for."""
    _checks.require(
        (sparsity is None) != (pattern is None),
        name,
        "sparsity",
        "given, or else pattern, and not both",
        f"sparsity {sparsity} and pattern {pattern}",
        "Pass sparsity=0.5, or pattern=(2, 4).",
    )
    if sparsity is not None:
        _checks.require(
            0 <= sparsity < 1,
            name,
            "sparsity",
            "at least 0 and below 1",
            sparsity,
            "It is the share of the weights that are set to zero.",
        )
        return 0, 0
    whole = isinstance(pattern, tuple) and [type(part) for part in pattern] == [int, int]
    _checks.require(
        whole and 1 <= pattern[0] < pattern[1],  # type: ignore[index]
        name,
        "pattern",
        "(keep, of) with 1 <= keep < of",
        pattern,
        "(2, 4) keeps 2 of every 4 weights.",
    )
    keep, of = pattern  # type: ignore[misc]
    _checks.require(
        n % of == 0,
        name,
        "pattern",
        f"of groups that divide the {n} columns",
        pattern,
        "Groups lie along the rows and none may be cut.",
    )
    return keep, of


def _counts(sparsity: float, dead: Tensor, m: int, block_size: int) -> Tensor:
    """Return how many weights each block of each layer loses, (blocks, B) int64.

    Dead columns go whole; what is missing then is shared by the live columns, with the rounding
    carried from block to block, so that the sum is exact.
    """
    batch, n = dead.shape
    edges = torch.tensor([*range(0, n, block_size), n])
    dead_before = torch.cat((dead.new_zeros(batch, 1), dead), 1).long().cumsum(1)[:, edges]
    live_before = edges - dead_before
    live = live_before[:, -1:]  # at least 1: the mean of the diagonal is positive
    target = (round(sparsity * m * n) - m * dead_before[:, -1:]).clamp(min=0)
    before = (2 * target * live_before + live) // (2 * live) + m * dead_before
    return before.diff(dim=1).T.contiguous()


def _require_finite(name: str, result: Tensor, losses: Tensor) -> None:
    batch = result if result.dim() == 3 else result.unsqueeze(0)
    finite = _checks.all_finite(batch) & torch.isfinite(losses)
    if not bool(finite.all()):
        dtype = str(result.dtype).removeprefix("torch.")
        raise RuntimeError(
            f"{name}: the compensated weights and their loss must be finite, got NaN or infinity "
            f"in batch {_checks.bad_entries(~finite)} in {dtype}. Use more damping, or wider types."
        )


def _factor_with(h: Tensor, damping: float, limit: float) -> tuple[Tensor, Tensor]:
    # With J the exchange of first and last: J H J = L L^T, and U = J L^-1 J is upper with
    # U^T U = H^-1, which is never formed.
    with full_precision():
        lower, used = _damping.climb(
            "prune_weights", h.flip(-2, -1), damping, limit, inverse_factors
        )
    return lower.flip(-2, -1), used


def _sweep_with(
    weight: Tensor,
    factor: Tensor,
    dead: Tensor,
    counts: Tensor,
    keep: int,
    of: int,
    block_size: int,
    steps: _walk.Steps,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, m, n = weight.shape
    state = _walk.State(
        weight.clone(memory_format=torch.contiguous_format),
        factor.contiguous(),
        torch.ones(batch, m, n, dtype=torch.bool, device=weight.device),
        weight.new_empty(batch, n, m),
        torch.zeros(batch, m, dtype=torch.float64, device=weight.device),
        dead.contiguous(),
        keep,
        of,
    )
    with full_precision():
        _walk.sweep(state, counts.contiguous(), block_size, steps)
    return state.weight, state.mask, state.losses.sum(1)


@torch.library.custom_op("mosaic_kernels::upper_inverse_factor", mutates_args=())
def _factor_op(h: Tensor, damping: float, max_damping: float) -> tuple[Tensor, Tensor]:
    raise NotImplementedError(f"prune_weights: no implementation for {h.device.type}")


@_factor_op.register_kernel("cpu")
def _factor_cpu(h: Tensor, damping: float, max_damping: float) -> tuple[Tensor, Tensor]:
    return _factor_with(h, damping, max_damping)


@_factor_op.register_kernel("cuda")
def _factor_cuda(h: Tensor, damping: float, max_damping: float) -> tuple[Tensor, Tensor]:
    return _factor_with(h, damping, max_damping)


@_factor_op.register_fake
def _factor_fake(h: Tensor, damping: float, max_damping: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty(h.shape[0], dtype=torch.float64, device="cpu")


@torch.library.custom_op("mosaic_kernels::prune_weights", mutates_args=())
def _sweep_op(
    weight: Tensor,
    factor: Tensor,
    dead: Tensor,
    counts: Tensor,
    keep: int,
    of: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError(f"prune_weights: no implementation for {weight.device.type}")


@_sweep_op.register_kernel("cpu")
def _sweep_cpu(
    weight: Tensor,
    factor: Tensor,
    dead: Tensor,
    counts: Tensor,
    keep: int,
    of: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _sweep_with(weight, factor, dead, counts, keep, of, block_size, _walk.STEPS_CPU)


@_sweep_op.register_kernel("cuda")
def _sweep_cuda(
    weight: Tensor,
    factor: Tensor,
    dead: Tensor,
    counts: Tensor,
    keep: int,
    of: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _sweep_with(weight, factor, dead, counts, keep, of, block_size, _walk.STEPS_CUDA)


@_sweep_op.register_fake
def _sweep_fake(
    weight: Tensor,
    factor: Tensor,
    dead: Tensor,
    counts: Tensor,
    keep: int,
    of: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape, dtype=torch.bool),
        weight.new_empty(weight.shape[0], dtype=torch.float64),
    )
