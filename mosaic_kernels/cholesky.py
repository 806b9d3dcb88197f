"""Inverse of a damped, symmetric, positive definite matrix: the matrix A of the method.

On the CPU a block sweep in place, one compiled call a batch; elsewhere the inverse factor L^-1 is
built by halves, with torch's batched products between diagonal blocks that are factored in cache.
`benchmarks/bench_cholesky.py` measures both beside LAPACK and cuSOLVER.
"""

import torch
from torch import Tensor

from mosaic_kernels import _checks, _damping
from mosaic_kernels._extension import EXTENSION
from mosaic_kernels._inverse_batched import invert_by_factors
from mosaic_kernels._precision import full_precision


def cholesky_inverse(
    h: Tensor, damping: float = 0.01, max_damping: float = _damping.MAX_DAMPING
) -> tuple[Tensor, Tensor]:
    """Invert H + d * mean(diag H) * I, raising d for a matrix that is not positive definite.

    A = (H + d * mean(diag H) * I)^-1. Where the Cholesky factor does not exist, d is raised
    tenfold for that matrix alone (from 1e-8 if it was 0), up to ``max_damping``; the others keep
    theirs. Works in the type of ``h``; on the CPU n^3 / 2 multiply-adds in the memory
    of the result, on CUDA 0.65 n^3 and one matrix more.

    Args:
        h: (B, n, n) or (n, n) float32 or float64, symmetric.
        damping: d, a share of the mean of diag(H), at least 0.
        max_damping: the largest d to try, at least ``damping``.

    Returns:
        The inverse, of the shape of ``h``, and the damping used, (B,) float64 on the CPU ((1,)
        for a single matrix).

    Raises:
        ValueError: H is not finite, or its diagonal is zero, or an argument is not as described.
        RuntimeError: no damping up to ``max_damping`` made the matrix positive definite.

    Source: Optimal Brain Surgeon (Hassibi & Stork 1993); damping as in SparseGPT (arXiv
    2301.00774), its ladder is ours.
    """
    name = "cholesky_inverse"
    _checks.require_tensor(name, "h", h, dims=(2, 3), dtypes=_checks.WIDE)
    _checks.require_square(name, "h", h)
    _checks.require_damping(name, damping)
    _checks.require(
        damping <= max_damping < float("inf"),
        name,
        "max_damping",
        f"finite and at least damping ({damping})",
        max_damping,
        "It ends the ladder of tenfold steps.",
    )
    batch = (h.unsqueeze(0) if h.dim() == 2 else h).detach()
    inverse, used = inverse_of_entries(batch, damping, max_damping)
    return (inverse[0] if h.dim() == 2 else inverse), used


def inverse_of_entries(
    h: Tensor,
    damping: float,
    max_damping: float = _damping.MAX_DAMPING,
    first: int = 0,
    label: str = "h",
) -> tuple[Tensor, Tensor]:
    """Invert (B, n, n) entries of a larger batch.

    ``first`` is the number of the first of them, ``label`` the caller's name of the batch.
    """
    inverse, used = _inverse_op(h, float(damping), float(max_damping), first)
    cure = ", or raise max_damping"
    _damping.require_factor("cholesky_inverse", used, max_damping, cure, first, label)
    return inverse, used


def invert_cpp(damped: Tensor, failed: Tensor) -> Tensor:
    """Invert (B, n, n) matrices in their own memory, compiled; see ``_damping.Attempt``."""
    assert EXTENSION.module is not None
    EXTENSION.module.invert_matrices(
        damped.data_ptr(),
        damped.shape[0],
        damped.shape[1],
        failed.data_ptr(),
        damped.element_size(),
        torch.get_num_threads(),
    )
    return damped


INVERT_CPU: _damping.Attempt = invert_by_factors if EXTENSION.module is None else invert_cpp


@torch.library.custom_op("mosaic_kernels::cholesky_inverse", mutates_args=())
def _inverse_op(h: Tensor, damping: float, max_damping: float, first: int) -> tuple[Tensor, Tensor]:
    raise NotImplementedError(f"cholesky_inverse: no implementation for {h.device.type}")


@_inverse_op.register_kernel("cpu")
def _inverse_cpu(
    h: Tensor, damping: float, max_damping: float, first: int
) -> tuple[Tensor, Tensor]:
    with full_precision():
        return _damping.climb("cholesky_inverse", h, damping, max_damping, INVERT_CPU, first)


@_inverse_op.register_kernel("cuda")
def _inverse_cuda(
    h: Tensor, damping: float, max_damping: float, first: int
) -> tuple[Tensor, Tensor]:
    with full_precision():
        return _damping.climb("cholesky_inverse", h, damping, max_damping, invert_by_factors, first)


@_inverse_op.register_fake
def _inverse_fake(
    h: Tensor, damping: float, max_damping: float, first: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty(h.shape[0], dtype=torch.float64, device="cpu")
