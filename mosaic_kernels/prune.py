"""Greedy second-order elimination of groups of input columns, as a whole trajectory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mosaic_kernels import _checks, _elimination
from mosaic_kernels._precision import full_precision
from mosaic_kernels.cholesky import cholesky_inverse


@dataclass(frozen=True, eq=False)
class Trajectory:
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

    order: Tensor
    losses: Tensor
    damping: Tensor
    group_size: int
    columns: int

    def kept(self, level: int, entry: int = 0) -> Tensor:
        """Return the sorted columns that are left after the first ``level`` removals.

        Args:
            level: number of removed groups, 0 to K.
            entry: which layer of the batch.

        Returns:
            (columns - level * group_size,) int64, on the device of ``order``.

        Raises:
            ValueError: ``level`` or ``entry`` is out of range.
        """
        batch, count = self.order.shape
        for label, value, end in (("level", level, count + 1), ("entry", entry, batch)):
            _checks.require(
                0 <= value < end,
                "Trajectory.kept",
                label,
                f"between 0 and {end - 1}",
                value,
                "Prune with a larger count to go further."
                if label == "level"
                else "The trajectory holds one entry for each layer of the batch.",
            )
        alive = torch.ones(
            self.columns // self.group_size, dtype=torch.bool, device=self.order.device
        )
        alive[self.order[entry, :level]] = False
        return torch.nonzero(alive.repeat_interleave(self.group_size)).flatten()


def prune_columns(
    weight: Tensor,
    h: Tensor,
    *,
    group_size: int = 1,
    count: int | None = None,
    damping: float = 0.01,
) -> Trajectory:
    """Remove groups of input columns one by one, always the one of least loss.

    With A the inverse of the damped H and S a group of ``group_size`` consecutive columns:
    loss(S) = trace(W_S (A_SS)^-1 W_S^T), W <- W - W_S (A_SS)^-1 A_S:,
    A <- A - A_:S (A_SS)^-1 A_S:. The elimination keeps G = W^T W beside A instead of W and
    collects removals in panels, so that the work is matrix products: about 3/2 (n^3 - r^3) / 3
    multiply-adds to go from n to r columns. Works in the type of ``h``. Columns that never fired
    (H_jj = 0) count as zero weights and go first, at no loss. Ties go to the lowest index. The
    inputs are not modified.

    Args:
        weight: (B, m, n) or (m, n), any floating type; a batch holds layers of one shape.
        h: (B, n, n) or (n, n) float32 or float64, symmetric, as ``hessian_finalize_`` left it.
        group_size: columns in a group: 1 for FFN neurons, the head's width for heads.
        count: number of groups to remove; all of them by default.
        damping: share of mean(diag H) that is added to the diagonal, see ``cholesky_inverse``.

    Returns:
        The trajectory of the removals.

    Raises:
        ValueError: an argument is not as described, not finite, or a layer's H is all zero.
        RuntimeError: H has no Cholesky factor at any damping, or A stopped being positive
            definite during the elimination for lack of precision.

    Source: Optimal Brain Surgeon (Hassibi & Stork 1993), groups as in OBS-Diff (arXiv
    2510.06751); the blocked form is method section 4.
    """
    name = "prune_columns"
    weight, h = weight.detach(), h.detach()
    _check_layer(name, weight, h, (2, 3))
    _checks.require_damping(name, damping)
    n = h.shape[-1]
    _checks.require(
        group_size >= 1 and n % group_size == 0,
        name,
        "group_size",
        f"a divisor of the {n} columns",
        group_size,
        "Use 1 for neurons and the width of a head for heads.",
    )
    groups = n // group_size
    count = groups if count is None else count
    _checks.require(
        0 <= count <= groups,
        name,
        "count",
        f"between 0 and {groups}, the number of groups",
        count,
        "Leave it out for the whole trajectory.",
    )
    batch_h = h.unsqueeze(0) if h.dim() == 2 else h
    batch_weight = weight.unsqueeze(0) if weight.dim() == 2 else weight
    inverse, used = cholesky_inverse(batch_h, damping)
    dead = batch_h.diagonal(dim1=-2, dim2=-1) == 0
    work = batch_weight.to(h.dtype).masked_fill(dead[:, None, :], 0)
    order, losses = _prune_op(work, inverse, group_size, count)
    _check_losses(losses)
    return Trajectory(order, losses.double(), used, group_size, n)


def _check_layer(name: str, weight: Tensor, h: Tensor, dims: tuple[int, ...]) -> None:
    _checks.require_tensor(name, "h", h, dims=dims, dtypes=_checks.WIDE)
    _checks.require_square(name, "h", h)
    _checks.require_tensor(name, "weight", weight, dims=(h.dim(),), dtypes=_checks.FLOATS, like=h)
    _checks.require(
        weight.shape[:-2] == h.shape[:-2] and weight.shape[-1] == h.shape[-1],
        name,
        "weight",
        f"{(*h.shape[:-2], 'm', h.shape[-1])} to match h",
        _checks.describe(weight),
        "H is that of the layer's input columns.",
    )
    batch = weight.unsqueeze(0) if weight.dim() == 2 else weight
    finite = _checks.all_finite(batch)
    _checks.require(
        bool(finite.all()),
        name,
        "weight",
        "finite",
        f"NaN or infinity in batch {_checks.bad_entries(~finite)}",
        "The checkpoint is damaged, or was cast to too narrow a type.",
    )


def _check_losses(losses: Tensor) -> None:
    broken = torch.isnan(losses)
    failed = broken.any(-1)
    if bool(failed.any()):
        first = int(losses.shape[1] - broken[failed].sum(-1).max())
        dtype = str(losses.dtype).removeprefix("torch.")
        raise RuntimeError(
            f"prune_columns: A must stay positive definite during the elimination, got a "
            f"breakdown in batch {_checks.bad_entries(failed)} at removal {first} in {dtype}. "
            "Pass h in float64, or use more damping."
        )


def compensate(weight: Tensor, h: Tensor, kept: Tensor, *, damping: float = 0.01) -> Tensor:
    """Return the weights of the kept columns that best replace the layer.

    W' = (W H_:R) (H_RR)^-1 for the kept columns R, with H damped: the least squares solution,
    which is where the elimination ends, whatever the order. Works in the type of ``h``;
    k^3 / 6 + m n k + m k^2 multiply-adds.

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

    Source: method section 4, identity 1.
    """
    name = "compensate"
    _check_layer(name, weight, h, (2,))
    _checks.require_damping(name, damping)
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


@torch.library.custom_op("mosaic_kernels::prune_columns", mutates_args=())
def _prune_op(
    weight: Tensor, inverse: Tensor, group_size: int, count: int
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError(f"prune_columns: no implementation for {weight.device.type}")


@_prune_op.register_kernel("cpu")
def _prune_cpu(
    weight: Tensor, inverse: Tensor, group_size: int, count: int
) -> tuple[Tensor, Tensor]:
    with full_precision():
        return _elimination.eliminate(weight, inverse, group_size, count, _elimination.PANEL_CPU)


@_prune_op.register_kernel("cuda")
def _prune_cuda(
    weight: Tensor, inverse: Tensor, group_size: int, count: int
) -> tuple[Tensor, Tensor]:
    with full_precision():
        return _elimination.eliminate(weight, inverse, group_size, count, _elimination.PANEL_CUDA)


@_prune_op.register_fake
def _prune_fake(
    weight: Tensor, inverse: Tensor, group_size: int, count: int
) -> tuple[Tensor, Tensor]:
    shape = (weight.shape[0], count)
    return inverse.new_empty(shape, dtype=torch.int64), inverse.new_empty(shape)


@torch.library.custom_op("mosaic_kernels::compensate", mutates_args=())
def _compensate_op(weight: Tensor, h: Tensor, kept: Tensor, damping: float) -> Tensor:
    with full_precision():
        return _least_squares(weight, h, kept, damping)


def _least_squares(weight: Tensor, h: Tensor, kept: Tensor, damping: float) -> Tensor:
    ridge = damping * h.diagonal().mean()
    square = h[kept][:, kept]
    square.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(square)
    if int(info) != 0:
        raise RuntimeError(
            f"compensate: h must be positive definite on the kept columns after damping, got no "
            f"Cholesky factor at damping {damping}. Pass the damping of the trajectory, or more."
        )
    # W H_:R of the damped H: the ridge meets only the kept columns themselves.
    wide = weight.to(h.dtype)
    right = wide @ h[:, kept] + ridge * wide[:, kept]
    return torch.cholesky_solve(right.mT, factor).mT.to(weight.dtype).contiguous()


@_compensate_op.register_fake
def _compensate_fake(weight: Tensor, h: Tensor, kept: Tensor, damping: float) -> Tensor:
    return weight.new_empty(weight.shape[0], kept.shape[0])
