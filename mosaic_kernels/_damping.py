"""The ladder of damping: raised for a matrix without a Cholesky factor, and for that one alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from mosaic_kernels import _checks

FIRST_DAMPING = 1e-8  # where the ladder starts when damping 0 does not do
MAX_DAMPING = 10.0  # where it ends

# Takes damped matrices (B, n, n), which it may overwrite, and flags (B,) bool that it sets where
# one has no factor; returns what is wanted of each, (B, n, n).
Attempt = Callable[[Tensor, Tensor], Tensor]


def climb(h: Tensor, damping: float, limit: float, attempt: Attempt) -> tuple[Tensor, Tensor]:
    """Return ``attempt`` of H + d * mean(diag H) * I and the d used, (B,) float64 on the CPU.

    d is raised tenfold where the attempt fails or is not finite; past ``limit`` it is infinite,
    and that entry of the result means nothing.
    """
    result: Tensor | None = None
    used = torch.full((h.shape[0],), float("inf"), dtype=torch.float64)
    mean = h.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    waiting = torch.arange(h.shape[0], device=h.device)
    level = damping
    while waiting.numel() and level <= limit * (1 + 1e-9):
        damped = h[waiting].contiguous()  # indexing may keep the strides of a transpose
        damped.diagonal(dim1=-2, dim2=-1).add_((level * mean[waiting])[:, None].to(h.dtype))
        failed = torch.zeros(waiting.shape, dtype=torch.bool, device=h.device)
        attempted = attempt(damped, failed)
        failed |= ~_checks.all_finite(attempted)
        done = ~failed
        if result is None:
            result = attempted
        else:
            result[waiting[done]] = attempted[done]
        used[waiting[done].cpu()] = level
        waiting = waiting[failed]
        level = level * 10 if level > 0 else FIRST_DAMPING
    assert result is not None
    return result, used


def require_factor(function: str, used: Tensor, limit: float, cure: str = "") -> None:
    """Raise a RuntimeError that names the entries for which no damping was enough."""
    failed = torch.isinf(used)
    if bool(failed.any()):
        raise RuntimeError(
            f"{function}: h must be positive definite after damping, got no Cholesky factor for "
            f"batch {_checks.bad_entries(failed)} with damping up to {limit}. Check that H is "
            f"finalised and symmetric{cure}."
        )
