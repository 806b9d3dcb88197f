"""Accumulate and finalise H = sum over calibration tokens of weight * x x^T.

Between the first update and the finalisation only the lower triangle of H is meaningful: the
product is symmetric, and half of it is half the work.
"""

from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor

from mosaic_kernels import _checks, _products
from mosaic_kernels._extension import EXTENSION

# Reduced-precision inputs are upcast this many tokens at a time: 8192 tokens of 4608 channels
# are 151 MB in float32, where a long video's activations at once would be gigabytes.
UPCAST_TOKENS = 8192


def hessian_update_(h: Tensor, x: Tensor, weight: float = 1.0, sum_x: Tensor | None = None) -> None:
    """Add one batch of activations to H, and their sum to sum_x.

    H += weight * X^T X (lower triangle), sum_x += weight * X^T 1. The sums are kept in the type
    of ``h``; inputs of any type enter exactly (float64 inputs are rounded to that type). On the
    CPU the product is torch's, on CUDA a Triton kernel that reads X once for both sums, without
    TF32. No atomics: the same calls give the same bits. Cost: tokens * n^2 / 2 multiply-adds.

    Args:
        h: (n, n) float32, or float64 on the CPU; contiguous. Only the lower triangle is updated
            meaningfully; the upper is undefined until ``hessian_finalize_``.
        x: (tokens, n) bfloat16, float16, float32 or float64; rows may be strided; tokens may be 0.
        weight: weight of the batch, finite and at least 0 (a timestep's weight).
        sum_x: (n,) in the type of ``h``, contiguous, or None.

    Raises:
        ValueError: an argument is not as described.

    Source: MosaicDiff (arXiv 2510.11962) and OBS-Diff (arXiv 2510.06751), weighted Hessian.
    """
    name = "hessian_update_"
    _check_accumulator(name, h, sum_x)
    _checks.require_tensor(name, "x", x, dims=(2,), dtypes=_checks.FLOATS, like=h)
    _checks.require(
        x.shape[1] == h.shape[0],
        name,
        "x",
        f"(tokens, {h.shape[0]}) to match h",
        _checks.describe(x),
        "Flatten the batch and sequence dimensions and pass the reader's input.",
    )
    _checks.require(
        isfinite(weight) and weight >= 0,
        name,
        "weight",
        "finite and at least 0",
        weight,
        "Use 0 to leave a timestep out.",
    )
    if x.shape[0] == 0 or weight == 0:
        return
    x = x.detach() if x.stride(1) == 1 else x.detach().contiguous()
    _update_op(h, x, float(weight), sum_x)


def hessian_finalize_(h: Tensor, total_weight: float, sum_x: Tensor | None = None) -> None:
    """Turn the sums into means: mirror the lower triangle of H, divide H and sum_x.

    H <- (lower + lower^T) / total_weight, sum_x <- sum_x / total_weight. Nothing is written
    when it raises. One synchronisation, for the check; n^2 reads and writes.

    Args:
        h: (n, n) float32 or float64, contiguous; its lower triangle as ``hessian_update_`` left it.
        total_weight: the sum over all tokens of their weights, above 0.
        sum_x: (n,) in the type of ``h``, contiguous, or None.

    Raises:
        ValueError: no sample was seen (``total_weight`` is 0), diag(H) or sum_x is not finite, or
            an argument is not as described.

    A layer without samples is an error, never a layer of zeros.
    """
    name = "hessian_finalize_"
    _check_accumulator(name, h, sum_x)
    if not total_weight > 0 or not isfinite(total_weight):
        raise ValueError(
            f"{name}: total_weight must be finite and above 0, got {total_weight}. The "
            "accumulator saw no sample, or only samples of weight 0: check that the calibration "
            "inputs reach this layer."
        )
    for label, values in (("diag(h)", h.diagonal()), ("sum_x", sum_x)):
        if values is not None and not bool(torch.isfinite(values).all()):
            bad = int(torch.isfinite(values).logical_not().sum())
            raise ValueError(
                f"{name}: {label} must be finite, got {bad} values of {values.numel()} that are "
                "not. The calibration activations hold NaN or infinity, or overflowed: run the "
                "denoiser in bfloat16 or float32 and look at its inputs."
            )
    _finalize_op(h, float(total_weight), sum_x)


def _check_accumulator(name: str, h: Tensor, sum_x: Tensor | None) -> None:
    dtypes = (torch.float32,) if h.is_cuda and name == "hessian_update_" else _checks.WIDE
    _checks.require_tensor(name, "h", h, dims=(2,), dtypes=dtypes)
    _checks.require_square(name, "h", h)
    contiguous = h.is_contiguous() and (sum_x is None or sum_x.is_contiguous())
    _checks.require(
        contiguous, name, "h and sum_x", "contiguous", "a strided view", "Pass whole tensors."
    )
    if sum_x is not None:
        _checks.require_tensor(name, "sum_x", sum_x, dims=(1,), dtypes=(h.dtype,), like=h)
        _checks.require(
            sum_x.shape[0] == h.shape[0],
            name,
            "sum_x",
            f"({h.shape[0]},) to match h",
            _checks.describe(sum_x),
            "Allocate it with the width of the layer.",
        )


@torch.library.custom_op("mosaic_kernels::hessian_update_", mutates_args=("h", "sum_x"))
def _update_op(h: Tensor, x: Tensor, weight: float, sum_x: Tensor | None) -> None:
    raise NotImplementedError(f"hessian_update_: no implementation for {h.device.type}")


@_update_op.register_kernel("cpu")
def _update_cpu(h: Tensor, x: Tensor, weight: float, sum_x: Tensor | None) -> None:
    for rows in x.split(UPCAST_TOKENS) if x.dtype != h.dtype else (x,):
        rows = rows.to(h.dtype)
        _products.add_product_lower_(h, (rows, rows), alpha=weight)
        if sum_x is not None:
            sum_x.add_(rows.sum(0), alpha=weight)


@_update_op.register_kernel("cuda")
def _update_cuda(h: Tensor, x: Tensor, weight: float, sum_x: Tensor | None) -> None:
    try:
        from mosaic_kernels._triton.hessian import launch_update
    except ImportError as error:
        raise RuntimeError(
            f"hessian_update_: a tensor on {x.device} needs triton, and its import says: {error}. "
            "Install it with pip install triton, or calibrate on the CPU."
        ) from error
    launch_update(h, x, weight, sum_x)


@_update_op.register_fake
def _update_fake(h: Tensor, x: Tensor, weight: float, sum_x: Tensor | None) -> None:
    return None


@torch.library.custom_op("mosaic_kernels::hessian_finalize_", mutates_args=("h", "sum_x"))
def _finalize_op(h: Tensor, total_weight: float, sum_x: Tensor | None) -> None:
    raise NotImplementedError(f"hessian_finalize_: no implementation for {h.device.type}")


def finalize_torch(h: Tensor, total_weight: float, sum_x: Tensor | None) -> None:
    """Finalise with torch's operators, block by block."""
    h.div_(total_weight)
    _products.mirror_lower_(h)
    if sum_x is not None:
        sum_x.div_(total_weight)


def finalize_cpp(h: Tensor, total_weight: float, sum_x: Tensor | None) -> None:
    """Finalise with the compiled mirror: one pass over the matrix."""
    assert EXTENSION.module is not None
    EXTENSION.module.mirror_lower(
        h.data_ptr(), h.shape[0], total_weight, h.element_size(), torch.get_num_threads()
    )
    if sum_x is not None:
        sum_x.div_(total_weight)


FINALIZE_CPU: Callable[[Tensor, float, Tensor | None], None] = (
    finalize_torch if EXTENSION.module is None else finalize_cpp
)
_finalize_op.register_kernel("cpu")(FINALIZE_CPU)
_finalize_op.register_kernel("cuda")(finalize_torch)


@_finalize_op.register_fake
def _finalize_fake(h: Tensor, total_weight: float, sum_x: Tensor | None) -> None:
    return None
