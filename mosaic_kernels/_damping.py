"""The ladder of damping: raised for a matrix without a Cholesky factor, and for that one alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from mosaic_kernels import _checks

FIRST_DAMPING = 1e-8  # where the ladder starts when damping 0 does not do
MAX_DAMPING = 10.0  # where it ends

# Takes damped matrices (B, n, n), which it may overwrite, and flags (B,) bool that it sets where
# one has no factor; returns what is wanted of each, (B, n, n). It does not wait for the device.
Attempt = Callable[[Tensor, Tensor], Tensor]


def climb(
    name: str, h: Tensor, damping: float, limit: float, attempt: Attempt, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Return ``attempt`` of H + d * mean(diag H) * I and the d used, (B,) float64 on the CPU.

    d is raised tenfold where the attempt fails or is not finite; past ``limit`` it is infinite,
    and that entry of the result means nothing. Waits for the device once where every matrix has a
    factor, and once more for each step of the ladder.

    Args:
        name: the public function, for messages.
        h: (B, n, n).
        damping: d, where the ladder starts.
        limit: the largest d to try.
        attempt: what is wanted of a damped batch.
        first: number of the batch's first entry, for messages.

    Raises:
        ValueError: H is not finite, or the mean of its diagonal is not positive.
    """
    mean = h.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    result, failed = _attempt(h, damping * mean, attempt)
    # An attempt reads one triangle of H; what is wrong with the other has to be reported too.
    status = failed | ~_checks.all_finite(h) | ~(mean > 0)
    waiting = torch.nonzero(status.cpu()).flatten()
    used = torch.full((h.shape[0],), damping, dtype=torch.float64)
    if waiting.numel():
        require_usable(name, h, first)
    level = damping
    while waiting.numel():
        used[waiting] = float("inf")
        level = level * 10 if level > 0 else FIRST_DAMPING
        if level > limit * (1 + 1e-9):
            break
        index = waiting.to(h.device)
        again, failed = _attempt(h.index_select(0, index), level * mean[index], attempt)
        result.index_copy_(0, index, again)
        used[waiting] = level
        waiting = waiting[failed.cpu()]
    return result, used


def _attempt(h: Tensor, ridge: Tensor, attempt: Attempt) -> tuple[Tensor, Tensor]:
    damped = h.clone(memory_format=torch.contiguous_format)
    damped.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None].to(h.dtype))
    failed = torch.zeros(h.shape[0], dtype=torch.bool, device=h.device)
    result = attempt(damped, failed)
    return result, failed | ~_checks.all_finite(result)


def require_usable(name: str, h: Tensor, first: int = 0, label: str = "h") -> None:
    """Check that each matrix of a batch is finite and has a positive mean on its diagonal."""
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
    finite = _checks.all_finite(h)
    if not bool(finite.all()):
        raise ValueError(
            f"{name}: {label} must be finite, got NaN or infinity in batch "
            f"{_checks.bad_entries(~finite, first)}. Look at the calibration activations."
        )
    if not bool((mean > 0).all()):
        raise ValueError(
            f"{name}: {label} must be of positive mean diagonal, got {mean[mean <= 0].tolist()} "
            f"in batch {_checks.bad_entries(mean <= 0, first)}. No channel of that layer ever "
            "fired, or H is not a sum of x x^T: check the calibration inputs."
        )


def require_factor(
    name: str, used: Tensor, limit: float, cure: str = "", first: int = 0, label: str = "h"
) -> None:
    """Raise a RuntimeError that names the entries for which no damping was enough."""
    failed = torch.isinf(used)
    if bool(failed.any()):
        raise RuntimeError(
            f"{name}: {label} must be positive definite after damping, got no Cholesky factor for "
            f"batch {_checks.bad_entries(failed, first)} with damping up to {limit}. Check that H "
            f"is finalised and symmetric{cure}."
        )
