"""Greedy second-order elimination of groups of input columns, as a whole trajectory."""

from collections.abc import Callable

import torch
from torch import Tensor

from mosaic_kernels import _checks, _damping, _elimination, _memory, _products
from mosaic_kernels._extension import EXTENSION
from mosaic_kernels._precision import full_precision
from mosaic_kernels._trajectory import Removals
from mosaic_kernels.cholesky import inverse_of_entries


class Trajectory(Removals):
    """The order in which the groups of a layer, or of a batch of layers, are removed.

    Its first k entries are the pruning at level k: one elimination gives every sparsity level.

    Args:
        order: (B, K) int64, group indices in order of removal.
        losses: (B, K) float64, what each removal adds to the layer's squared error
            ||(W - W') L||_F^2 under the damped H = L L^T; the cumulative sum is the error.
        damping: (B,) float64 on the CPU, the damping that was used.
        group_size: columns in a group.
        columns: input columns of the layer, before pruning.
    """


def prune_columns(
    weight: Tensor,
    h: Tensor,
    *,
    group_size: int = 1,
    count: int | None = None,
    damping: float = 0.01,
    max_bytes: int | None = None,
) -> Trajectory:
    """Remove groups of input columns one by one, always the one of least loss.

    With A the inverse of the damped H and S a group of ``group_size`` consecutive columns:
    loss(S) = trace(W_S (A_SS)^-1 W_S^T), W <- W - W_S (A_SS)^-1 A_S:,
    A <- A - A_:S (A_SS)^-1 A_S:. The elimination keeps G = W^T W beside A instead of W and
    collects removals in panels, so that the work is matrix products: about 3/2 (n^3 - r^3) / 3
    multiply-adds to go from n to r columns. Works in the type of ``h``. Columns that never fired
    (H_jj = 0) count as zero weights and go first, at no loss. Ties go to the lowest index. The
    inputs are not modified. The layers of a batch are worked on together as far as memory allows:
    each takes two matrices of the size of H, a copy of its weights and a panel.

    Args:
        weight: (B, m, n) or (m, n), any floating type; a batch holds layers of one shape.
        h: (B, n, n) or (n, n) float32 or float64, symmetric, as ``hessian_finalize_`` left it.
        group_size: columns in a group: 1 for FFN neurons, the head's width for heads.
        count: number of groups to remove; all of them by default.
        damping: share of mean(diag H) that is added to the diagonal, see ``cholesky_inverse``.
        max_bytes: memory to use beside the inputs; what is free by default.

    Returns:
        The trajectory of the removals.

    Raises:
        ValueError: an argument is not as described, not finite, or a layer's H is all zero, or
            one layer alone does not fit into ``max_bytes``.
        RuntimeError: one layer alone does not fit into the free memory; H has no Cholesky factor
            at any damping; or A stopped being positive definite for lack of precision.

    Source: Optimal Brain Surgeon (Hassibi & Stork 1993), groups as in OBS-Diff (arXiv
    2510.06751); the blocked form is ours, see ``_elimination``.
    """
    name = "prune_columns"
    _checks.require_layer(name, weight, h, (2, 3))
    weight, h = weight.detach(), h.detach()
    _checks.require_damping(name, damping)
    n = h.shape[-1]
    count = _checks.require_removals(name, n, group_size, count)
    batch_h = h.unsqueeze(0) if h.dim() == 2 else h
    batch_weight = weight.unsqueeze(0) if weight.dim() == 2 else weight
    m, batch = batch_weight.shape[1], batch_h.shape[0]
    needed = elimination_bytes(m, n, group_size, h.element_size(), h.device)
    step = _memory.layers_at_once(name, batch, needed, h.device, max_bytes)
    order = torch.empty(batch, count, dtype=torch.int64, device=h.device)
    losses = h.new_empty(batch, count)
    used = torch.empty(batch, dtype=torch.float64)
    for begin in range(0, batch, step):
        part = slice(begin, begin + step)
        part_h = batch_h[part]
        inverse, used[part] = inverse_of_entries(part_h, damping, first=begin)
        dead = part_h.diagonal(dim1=-2, dim2=-1) == 0
        work = batch_weight[part].to(h.dtype).masked_fill(dead[:, None, :], 0)
        _eliminate_op(work, inverse, order[part], losses[part], group_size)
    check_losses(name, losses, losses.dtype)
    return Trajectory(order, losses.double(), used, group_size, n)


def elimination_bytes(
    rows: int, columns: int, group_size: int, element_size: int, device: torch.device
) -> int:
    """Return the memory that ``prune_columns`` needs for one layer beside its inputs.

    A and G, a copy of the weights, and U and V of a panel; where they are not packed in place,
    that is without the compiled module or on CUDA, a third matrix.
    """
    in_place = device.type == "cpu" and EXTENSION.module is not None
    matrices = 2 if in_place else 3
    panel = 6 * max(_elimination.PANEL_COLUMNS, group_size)
    return element_size * columns * (matrices * columns + rows + panel)


def check_losses(name: str, losses: Tensor, dtype: torch.dtype, what: str = "A") -> None:
    """Raise a RuntimeError where (B, K) losses are no numbers: their elimination broke down.

    ``dtype`` is the type it ran in, ``what`` the matrix that failed, both for the message.
    """
    broken = torch.isnan(losses)
    failed = broken.any(-1)
    if bool(failed.any()):
        first = int(losses.shape[1] - broken[failed].sum(-1).max())
        raise RuntimeError(
            f"{name}: {what} must stay positive definite during the elimination, got a "
            f"breakdown in batch {_checks.bad_entries(failed)} at removal {first} in "
            f"{_checks.names((dtype,))}. "
            "Pass h in float64, or use more damping."
        )


def compensate(weight: Tensor, h: Tensor, kept: Tensor, *, damping: float = 0.01) -> Tensor:
    """Return the weights of the kept columns that best replace the layer.

    W' = (W H_:R) (H_RR)^-1 = W_R + W_S H_SR (H_RR)^-1 for the kept columns R and the others S,
    with H damped: the least squares solution, which is where the elimination ends, whatever the
    order. Works in the type of ``h``; k^3 / 6 + m k (n - k) + m k^2 multiply-adds.

    Args:
        weight: (m, n), any floating type.
        h: (n, n) float32 or float64, symmetric, finalised.
        kept: (k,) int64, sorted, without repeats; may be empty.
        damping: the damping that was used for the trajectory (``Trajectory.damping``).

    Returns:
        (m, k) in the type of ``weight``.

    Raises:
        ValueError: an argument is not as described.
        RuntimeError: the damped H_RR has no Cholesky factor.

    Source: Optimal Brain Surgeon (Hassibi & Stork 1993): all removals at once.
    """
    name = "compensate"
    _checks.require_layer(name, weight, h, (2,))
    _checks.require_damping(name, damping)
    _damping.require_usable(name, h.unsqueeze(0))
    _checks.require_tensor(name, "kept", kept, dims=(1,), dtypes=(torch.int64,), like=h)
    if kept.numel():
        steps_up = bool((kept[1:] > kept[:-1]).all())
        inside = 0 <= int(kept[0]) and int(kept[-1]) < h.shape[0]
        _checks.require(
            steps_up and inside,
            name,
            "kept",
            f"sorted column indices between 0 and {h.shape[0] - 1} without repeats",
            f"{kept.numel()} indices from {int(kept.min())} to {int(kept.max())}",
            "Trajectory.kept gives them so.",
        )
    return _compensate_op(weight.detach(), h.detach(), kept, float(damping))


@torch.library.custom_op("mosaic_kernels::eliminate_", mutates_args=("inverse", "order", "losses"))
def _eliminate_op(
    weight: Tensor, inverse: Tensor, order: Tensor, losses: Tensor, group_size: int
) -> None:
    raise NotImplementedError(f"prune_columns: no implementation for {weight.device.type}")


@_eliminate_op.register_kernel("cpu")
def _eliminate_cpu(
    weight: Tensor, inverse: Tensor, order: Tensor, losses: Tensor, group_size: int
) -> None:
    _eliminate_with(weight, inverse, order, losses, group_size, _elimination.PANEL_CPU)


@_eliminate_op.register_kernel("cuda")
def _eliminate_cuda(
    weight: Tensor, inverse: Tensor, order: Tensor, losses: Tensor, group_size: int
) -> None:
    _eliminate_with(weight, inverse, order, losses, group_size, _elimination.PANEL_CUDA)


def _eliminate_with(
    weight: Tensor,
    inverse: Tensor,
    order: Tensor,
    losses: Tensor,
    group_size: int,
    run_panel: _elimination.RunPanel,
) -> None:
    with full_precision():
        result = _elimination.eliminate(weight, inverse, group_size, order.shape[1], run_panel)
    order.copy_(result[0])
    losses.copy_(result[1])


@_eliminate_op.register_fake
def _eliminate_fake(
    weight: Tensor, inverse: Tensor, order: Tensor, losses: Tensor, group_size: int
) -> None:
    return None


Solve = Callable[[Tensor, Tensor], tuple[Tensor, bool]]


def solve_torch(a: Tensor, b: Tensor) -> tuple[Tensor, bool]:
    """Return B A^-1 for (k, k) A, of which the lower triangle is read, and whether it exists."""
    factor, info = torch.linalg.cholesky_ex(a)
    return torch.cholesky_solve(b.mT, factor).mT, int(info) == 0


def solve_cpp(a: Tensor, b: Tensor) -> tuple[Tensor, bool]:
    """Solve as ``solve_torch`` does, compiled, in the memory of ``a`` and ``b``."""
    assert EXTENSION.module is not None
    rows, n = b.shape
    threads = torch.get_num_threads()
    solved = EXTENSION.module.solve_right(
        a.data_ptr(), b.data_ptr(), n, rows, a.element_size(), threads
    )
    return b, solved


SOLVE_CPU: Solve = solve_torch if EXTENSION.module is None else solve_cpp


@torch.library.custom_op("mosaic_kernels::compensate", mutates_args=())
def _compensate_op(weight: Tensor, h: Tensor, kept: Tensor, damping: float) -> Tensor:
    raise NotImplementedError(f"compensate: no implementation for {weight.device.type}")


@_compensate_op.register_kernel("cpu")
def _compensate_cpu(weight: Tensor, h: Tensor, kept: Tensor, damping: float) -> Tensor:
    with full_precision():
        return _compensate_with(weight, h, kept, damping, SOLVE_CPU)


@_compensate_op.register_kernel("cuda")
def _compensate_cuda(weight: Tensor, h: Tensor, kept: Tensor, damping: float) -> Tensor:
    with full_precision():
        return _compensate_with(weight, h, kept, damping, solve_torch)


def _compensate_with(
    weight: Tensor, h: Tensor, kept: Tensor, damping: float, solve: Solve
) -> Tensor:
    removed = torch.ones(h.shape[0], dtype=torch.bool, device=h.device)
    removed[kept] = False
    rest = torch.nonzero(removed).flatten()
    remaining = weight.index_select(1, kept)
    if not kept.numel() or not rest.numel():
        return remaining
    square = _products.pack_square(h[None], kept[None])[0]
    square.diagonal().add_(damping * h.diagonal().mean())
    # W' = W_R + W_S H_SR (H_RR)^-1 with S the removed columns: the same least squares as
    # (W H_:R) (H_RR)^-1 in fewer operations, and only the correction is rounded. The ridge
    # does not meet H_SR.
    cross = h.index_select(0, rest).index_select(1, kept)
    correction, exists = solve(
        square, _products.product(weight.index_select(1, rest).to(h.dtype).mT, cross)
    )
    if not exists:
        raise RuntimeError(
            f"compensate: h must be positive definite on the kept columns after damping, got no "
            f"Cholesky factor at damping {damping}. Pass the damping of the trajectory, or more."
        )
    return (remaining.to(h.dtype) + correction).to(weight.dtype).contiguous()


@_compensate_op.register_fake
def _compensate_fake(weight: Tensor, h: Tensor, kept: Tensor, damping: float) -> Tensor:
    return weight.new_empty(weight.shape[0], kept.shape[0])
