"""Accumulate and finalise H = sum over calibration tokens of weight * x x^T.

Between the first update and the finalisation only the lower triangle of H is meaningful: the
product is symmetric, and half of it is half the work. With a ``residual`` the other triangle holds
what rounding has taken from the sums so far, so that millions of tokens add up without loss.
"""

from collections.abc import Iterator
from importlib import import_module
from math import isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mosaic_kernels import _checks, _products
from mosaic_kernels._compensated import (
    ADD_COMPENSATED_CPU,
    FINALIZE_CPU,
    finalize_torch,
    two_sum,
)

# Tokens of one plain partial sum. Where the product does not widen narrow inputs by itself they are
# upcast as many at a time: 8192 tokens of 4608 channels are 151 MB in float32, where a long video's
# would be gigabytes at once.
CHUNK_TOKENS = 8192


def hessian_update_(
    h: Tensor,
    x: Tensor,
    weight: float | Tensor = 1.0,
    sum_x: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Add one batch of activations to H, and their sum to sum_x.

    H += weight * X^T X (lower triangle), sum_x += weight * X^T 1. The sums are kept in the type
    of ``h``; inputs of any type enter exactly (float64 inputs are rounded to that type). Weights
    multiply the sums, at the end of a sample, never X. No atomics: the same calls on the same
    device give the same bits.

    Without ``residual`` each update is rounded once as it is added: fine for some thousands of
    updates of like size. With it the rounding error, which the addition's own formula gives
    exactly (two-sum), is kept beside the sum, and ``hessian_finalize_`` adds it: the sums are then
    as good as one rounding of H, however many updates there were. Inside an update at most 8192
    tokens go into one plain sum.

    Cost: tokens * n * (n + 1) operations. On CUDA a Triton product on tensor cores (float32 as
    three TF32 products, never one) and a merge into H, with a workspace of at most 650 MB (n =
    4608, 32768 tokens: 190 MB). On the CPU a compiled product that reads narrow inputs as they
    are, and n^2 values more with ``residual``.

    Args:
        h: (n, n), or (B, n, n) for several layers of one width; float32, or float64 on the CPU;
            contiguous. Starts as zeros. Only the lower triangle is updated meaningfully; the
            upper is undefined until ``hessian_finalize_``.
        x: (tokens, n) or (B, tokens, n) bfloat16, float16, float32 or float64; rows may be
            strided.
        weight: of every token (a timestep's weight), finite and at least 0; or of every sample:
            (samples,) float32 or float64 on the CPU, where the tokens are ``samples`` runs of
            equal length, the same for all layers. A sample of weight 0 is not read. The total
            weight that ``hessian_finalize_`` wants grows by the weights of all tokens: weight *
            tokens, or the sum of the samples' weights times tokens / samples.
        sum_x: (n,) or (B, n) in the type of ``h``, contiguous, or None.
        residual: (2, n) or (B, 2, n) in the type of ``h``, contiguous; starts as zeros; or None.
            The errors of diag(H) and of sum_x; those of H_ij, i > j, are kept at H_ji. Give it to
            every update of this H, and to its finalisation, or to none.

    Raises:
        ValueError: an argument is not as described.

    Source: MosaicDiff (arXiv 2510.11962) and OBS-Diff (arXiv 2510.06751), weighted Hessian; the
    two-sum is Knuth's (The Art of Computer Programming 2, 4.2.2).
    """
    name = "hessian_update_"
    _check_accumulator(name, h, sum_x, residual)
    _checks.require_tensor(name, "x", x, dims=(h.dim(),), dtypes=_checks.FLOATS, like=h)
    batch = () if h.dim() == 2 else (h.shape[0],)
    _checks.require(
        x.shape[-1] == h.shape[-1] and x.shape[:-2] == h.shape[:-2],
        name,
        "x",
        f"({', '.join(map(str, (*batch, 'tokens', h.shape[-1])))}) to match h",
        _checks.describe(x),
        "Flatten the batch and sequence dimensions and pass the reader's input.",
    )
    _checks.require(
        x.shape[-2] > 0,
        name,
        "x",
        "of at least one token",
        _checks.describe(x),
        "Nothing reaches this layer: look at the calibration inputs.",
    )
    scalar, weights = _split_weight(name, weight, x.shape[-2])
    if scalar == 0 or (weights is not None and not weights.any()):
        return
    x = x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
    _update_op(*_batched(2, h, x), scalar, weights, *_batched(1, sum_x), *_batched(2, residual))


def hessian_finalize_(
    h: Tensor, total_weight: float, sum_x: Tensor | None = None, residual: Tensor | None = None
) -> None:
    """Turn the sums into means: add the errors kept, mirror the lower triangle of H, divide.

    H <- (lower + lower^T) / total_weight, sum_x <- sum_x / total_weight. Nothing is written
    when it raises. One synchronisation, for the check; n^2 reads and writes.

    Args:
        h: (n, n) or (B, n, n) float32 or float64, contiguous; as ``hessian_update_`` left it.
        total_weight: the sum over all tokens of their weights, above 0.
        sum_x: (n,) or (B, n) in the type of ``h``, contiguous, or None.
        residual: (2, n) or (B, 2, n), as ``hessian_update_`` left it; or None where the updates
            had none. Spent afterwards: start a new sum with zeros.

    Raises:
        ValueError: no sample was seen (``total_weight`` is 0), diag(H), sum_x or the residual is
            not finite, or an argument is not as described.

    A layer without samples is an error, never a layer of zeros.
    """
    name = "hessian_finalize_"
    _check_accumulator(name, h, sum_x, residual)
    if not total_weight > 0 or not isfinite(total_weight):
        raise ValueError(
            f"{name}: total_weight must be finite and above 0, got {total_weight}. "
            "It is the sum over all tokens of their weights; where that is 0 the accumulator saw "
            "no sample, or only samples of weight 0: check that the calibration inputs reach this "
            "layer."
        )
    sums = {"diag(h)": h.diagonal(dim1=-2, dim2=-1), "sum_x": sum_x, "residual": residual}
    found = {label: torch.isfinite(values) for label, values in sums.items() if values is not None}
    if not bool(torch.stack([finite.all() for finite in found.values()]).all()):
        label, finite = next((k, v) for k, v in found.items() if not bool(v.all()))
        where = "" if h.dim() == 2 else f" ({_checks.bad_entries(~finite.flatten(1).all(1))})"
        raise ValueError(
            f"{name}: {label} must be finite, got {int((~finite).sum())} values of "
            f"{finite.numel()} that are not{where}. The calibration activations hold NaN or "
            "infinity, or overflowed: run the denoiser in bfloat16 or float32 and look at its "
            "inputs."
        )
    _finalize_op(*_batched(2, h), float(total_weight), *_batched(1, sum_x), *_batched(2, residual))


def _batched(dims: int, *tensors: Any) -> Iterator[Any]:
    """Yield views with a batch dimension in front of the last ``dims``; None stays None."""
    for tensor in tensors:
        yield tensor if tensor is None or tensor.dim() > dims else tensor.unsqueeze(0)


def _split_weight(name: str, weight: float | Tensor, tokens: int) -> tuple[float, Tensor | None]:
    """Check a weight and return (weight of everything, weights of samples or None)."""
    if not isinstance(weight, Tensor):
        _checks.require(
            isinstance(weight, Real),
            name,
            "weight",
            "a number, or a tensor on the CPU with one for each sample",
            type(weight).__name__,
            "Convert it with torch.tensor().",
        )
        _checks.require(
            isfinite(weight) and weight >= 0,
            name,
            "weight",
            "finite and at least 0",
            weight,
            "Use 0 to leave a timestep out.",
        )
        return float(weight), None
    _checks.require(
        weight.device.type == "cpu",
        name,
        "weight",
        "a number or a tensor on the CPU, where it is checked without a synchronisation",
        _checks.describe(weight),
        "Keep the weights of samples on the CPU.",
    )
    _checks.require_tensor(name, "weight", weight, dims=(1,), dtypes=_checks.WIDE)
    _checks.require(
        weight.numel() > 0 and tokens % weight.numel() == 0,
        name,
        "weight",
        f"(samples,) with {tokens} tokens a multiple of samples",
        _checks.describe(weight),
        "Give one weight for each sample of the batch; samples have equally many tokens.",
    )
    bad = weight[~(torch.isfinite(weight) & (weight >= 0))]
    _checks.require(
        bad.numel() == 0,
        name,
        "weight",
        "finite and at least 0",
        bad[:8].tolist(),
        "Use 0 to leave a sample out.",
    )
    return 1.0, weight.detach().contiguous()


def _check_accumulator(name: str, h: Tensor, sum_x: Tensor | None, residual: Tensor | None) -> None:
    dtypes = (torch.float32,) if h.is_cuda and name == "hessian_update_" else _checks.WIDE
    _checks.require_tensor(name, "h", h, dims=(2, 3), dtypes=dtypes)
    _checks.require_square(name, "h", h)
    given = [tensor for tensor in (h, sum_x, residual) if tensor is not None]
    _checks.require(
        all(tensor.is_contiguous() for tensor in given),
        name,
        "h and sum_x" if residual is None else "h, sum_x and residual",
        "contiguous",
        "a strided view",
        "Pass whole tensors.",
    )
    for label, tensor, shape in (
        ("sum_x", sum_x, (*h.shape[:-2], h.shape[-1])),
        ("residual", residual, (*h.shape[:-2], 2, h.shape[-1])),
    ):
        if tensor is None:
            continue
        dims = (len(shape),)
        _checks.require_tensor(name, label, tensor, dims=dims, dtypes=(h.dtype,), like=h)
        _checks.require(
            tensor.shape == shape,
            name,
            label,
            f"{shape} to match h",
            _checks.describe(tensor),
            "Allocate it with the width of the layer.",
        )


# The operators take batches: h (B, n, n), x (B, tokens, n), sum_x (B, n), residual (B, 2, n).
@torch.library.custom_op("mosaic_kernels::hessian_update_", mutates_args=("h", "sum_x", "residual"))
def _update_op(
    h: Tensor,
    x: Tensor,
    weight: float,
    weights: Tensor | None,
    sum_x: Tensor | None,
    residual: Tensor | None,
) -> None:
    raise NotImplementedError(f"hessian_update_: no implementation for {h.device.type}")


@_update_op.register_kernel("cpu")
def _update_cpu(
    h: Tensor,
    x: Tensor,
    weight: float,
    weights: Tensor | None,
    sum_x: Tensor | None,
    residual: Tensor | None,
) -> None:
    factors = [weight] if weights is None else [weight * factor for factor in weights.tolist()]
    for entry in range(h.shape[0]):
        total = None if sum_x is None else sum_x[entry]
        chunks = _chunks(x[entry], factors)
        if residual is None:
            for pieces in chunks:
                _add_plainly(h[entry], total, pieces)
            continue
        part = torch.empty_like(h[entry])
        part_sum = None if total is None else torch.empty_like(total)
        for pieces in chunks:
            part.zero_()
            if part_sum is not None:
                part_sum.zero_()
            _add_plainly(part, part_sum, pieces)
            ADD_COMPENSATED_CPU(h[entry], part, residual[entry, 0])
            if total is not None and part_sum is not None:
                total_after, lost = two_sum(total, part_sum)
                total.copy_(total_after)
                residual[entry, 1] += lost


def _chunks(x: Tensor, factors: list[float]) -> Iterator[list[tuple[Tensor, float]]]:
    """Yield lists of (tokens of one sample, their weight), at most CHUNK_TOKENS in a list."""
    chunk: list[tuple[Tensor, float]] = []
    room = CHUNK_TOKENS
    for sample, factor in zip(x.chunk(len(factors)), factors, strict=True):
        for rows in sample.split(CHUNK_TOKENS) if factor > 0 else ():
            if len(rows) > room:
                yield chunk
                chunk, room = [], CHUNK_TOKENS
            chunk.append((rows, factor))
            room -= len(rows)
    yield chunk


def _add_plainly(h: Tensor, sum_x: Tensor | None, pieces: list[tuple[Tensor, float]]) -> None:
    for rows, factor in pieces:
        if not _products.widens(h, rows):
            rows = rows.to(h.dtype)
        _products.add_product_lower_(h, (rows, rows), alpha=factor)
        if sum_x is not None:
            sum_x.add_(rows.sum(0, dtype=h.dtype), alpha=factor)


@_update_op.register_kernel("cuda")
def _update_cuda(
    h: Tensor,
    x: Tensor,
    weight: float,
    weights: Tensor | None,
    sum_x: Tensor | None,
    residual: Tensor | None,
) -> None:
    kernels = _triton("hessian_update_", x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernels.launch_update(h, x, weight, weights, sum_x, residual)


def _triton(name: str, device: torch.device) -> Any:
    try:
        return import_module("mosaic_kernels._triton.hessian")
    except ImportError as error:
        raise RuntimeError(
            f"{name}: a tensor on {device} needs triton, and its import says: {error}. "
            "Install it with pip install triton, or calibrate on the CPU."
        ) from error


@_update_op.register_fake
def _update_fake(
    h: Tensor,
    x: Tensor,
    weight: float,
    weights: Tensor | None,
    sum_x: Tensor | None,
    residual: Tensor | None,
) -> None:
    return None


@torch.library.custom_op("mosaic_kernels::hessian_finalize_", mutates_args=("h", "sum_x"))
def _finalize_op(
    h: Tensor, total_weight: float, sum_x: Tensor | None, residual: Tensor | None
) -> None:
    raise NotImplementedError(f"hessian_finalize_: no implementation for {h.device.type}")


_finalize_op.register_kernel("cpu")(FINALIZE_CPU)
_finalize_op.register_kernel("cuda")(finalize_torch)


@_finalize_op.register_fake
def _finalize_fake(
    h: Tensor, total_weight: float, sum_x: Tensor | None, residual: Tensor | None
) -> None:
    return None


def tune_hessian(
    n: int,
    dtype: torch.dtype,
    tokens: int = 8192,
    per_sample: bool = False,
    device: torch.device | str = "cuda",
) -> dict[str, float]:
    """Time the few configurations of the Hessian update and keep the fastest for this process.

    Optional: without it the first of the table is used. The bits of H depend on the configuration,
    so tune before the first update, or not at all.

    Args:
        n: width of the layers.
        dtype: bfloat16, float16 or float32, of the activations.
        tokens: tokens of an update; calibration's usual number.
        per_sample: tune the updates with a weight for each sample.
        device: a CUDA device.

    Returns:
        The milliseconds of an update by configuration, in words.

    Raises:
        ValueError: an argument is not as described.
        RuntimeError: triton is not installed.
    """
    name = "tune_hessian"
    where = torch.device(device)
    nothing = "There is nothing to tune on the CPU."
    _checks.require(where.type == "cuda", name, "device", "a CUDA device", device, nothing)
    inputs = (torch.bfloat16, torch.float16, torch.float32)
    cure = "Pass the type of the activations."
    _checks.require(dtype in inputs, name, "dtype", _checks.names(inputs), dtype, cure)
    for label, value in (("n", n), ("tokens", tokens)):
        _checks.require(value >= 1, name, label, "at least 1", value, "Pass a usual size.")
    if not torch.cuda.is_available():
        raise RuntimeError(f"{name}: needs a CUDA device, and torch sees none. {nothing}")
    with torch.cuda.device(where):
        times: dict[str, float] = _triton(name, where).tune(where, dtype, n, tokens, per_sample)
    return times
