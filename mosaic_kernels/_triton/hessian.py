"""The Hessian update on CUDA: a persistent product of lower tiles, then one merge into H.

The product writes the partial sum of each of its work items into a workspace; the merge adds the
parts of a tile to H in a fixed order and keeps the rounding errors. So nothing is atomic, the
product ends in a plain store (with H, its errors and a tile of 128 x 256 in registers at once it
would spill), and H is read and written once an update, at the full rate of the memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaic_kernels._triton.hessian_configs import choose_config, device_class, remember_fastest
from mosaic_kernels._triton.hessian_plan import (
    LAUNCH_TOKENS,
    Config,
    Plan,
    make_plan,
    tile_order,
    windows,
)

MERGE_TILE = 64
# float32 is multiplied as three products of TF32 parts: measured against float64 (the test
# emulates the rounding, test_hessian_precision.py) the largest error relative to the largest entry
# is 2.3e-7 for 300 tokens and 7.1e-7 for 8192, where one fused multiply-add after another has
# 5.7e-7 and 3.0e-6 (the products of 32 tokens are a sum of their own), and plain TF32 4e-5 to
# 1e-4. It needs no format of 16 bits, so no value over- or underflows.
FLOAT32_PRECISION = "tf32x3"


@triton.jit(
    do_not_specialize=[
        "per_sample",
        "samples",
        "full",
        "full_parts",
        "splits",
        "items",
        "chunk",
        "tail_chunk",
    ]
)
def _product_kernel(
    parts_ptr,
    sums_ptr,
    x_ptr,
    units_ptr,
    weights_ptr,
    n,
    batch_stride,
    token_stride,
    per_sample,
    samples,
    full,
    full_parts,
    splits,
    items,
    chunk,
    tail_chunk,
    HAS_SUM: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TWO_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    steps = tl.arange(0, TOKENS)
    stride = tl.cast(token_stride, tl.int64)  # long batches pass 2^31 elements
    start = steps[:, None].to(tl.int64) * stride
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # The first ``full`` units keep every program busy, part after part, so that programs
        # that run together read the same tokens; the units after them are cut into ``splits``.
        unit = item % tl.maximum(full, 1)
        part = item // tl.maximum(full, 1)
        parts = full_parts
        length = chunk
        if item >= full * full_parts:
            unit = full + (item - full * full_parts) // splits
            part = (item - full * full_parts) % splits
            parts = splits
            length = tail_chunk
        entry = tl.load(units_ptr + 4 * unit).to(tl.int64)
        rows = tl.load(units_ptr + 4 * unit + 1) * ROWS + tl.arange(0, ROWS)
        cols = tl.load(units_ptr + 4 * unit + 2) * COLS + tl.arange(0, COLS)
        row_mask = (rows < n)[None, :]
        col_mask = (cols < n)[None, :]
        source = x_ptr + entry * batch_stride

        # A segment is a sample, or a piece of at most ``length`` tokens of one. Without a second
        # sum in registers an item is one segment.
        pieces = tl.cdiv(per_sample, length)
        segments = (samples * pieces).to(tl.int64)
        first = (segments * part // parts).to(tl.int32)
        last = (segments * (part + 1) // parts).to(tl.int32)
        acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
        if TWO_SUMS:
            total = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for segment in range(first, last):
            sample = segment // pieces
            begin = sample * per_sample + (segment - sample * pieces) * length
            end = tl.minimum(begin + length, (sample + 1) * per_sample)
            if WEIGHTED:
                weight = tl.load(weights_ptr + sample)
                end = tl.where(weight > 0, end, begin)  # weight 0 leaves even a NaN out
            if TWO_SUMS:
                acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
            for token in range(begin, end, TOKENS):
                base = source + token * stride
                inside = (steps < end - token)[:, None]
                left = tl.load(base + start + rows[None, :], mask=inside & row_mask, other=0.0)
                right = tl.load(base + start + cols[None, :], mask=inside & col_mask, other=0.0)
                acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
            if TWO_SUMS:
                if WEIGHTED:
                    total += weight * acc
                else:
                    total += acc
        slot = parts_ptr + tl.cast(item, tl.int64) * (ROWS * COLS)
        slot += tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        if TWO_SUMS:
            tl.store(slot, total)
        else:
            tl.store(slot, acc)

        # One unit in each row of tiles sums its columns too, in a second loop over tokens it has
        # just read: in the first loop the sum takes the registers that a wide tile needs (it
        # spills). These units come last, where items are short.
        if HAS_SUM:
            if tl.load(units_ptr + 4 * unit + 3) > 0:
                sums = tl.zeros((ROWS,), dtype=tl.float32)
                for segment in range(first, last):
                    sample = segment // pieces
                    begin = sample * per_sample + (segment - sample * pieces) * length
                    end = tl.minimum(begin + length, (sample + 1) * per_sample)
                    if WEIGHTED:
                        weight = tl.load(weights_ptr + sample)
                        end = tl.where(weight > 0, end, begin)
                    columns = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
                    for token in tl.range(begin, end, TOKENS, num_stages=4):
                        inside = (steps < end - token)[:, None]
                        columns += tl.load(
                            source + token * stride + start + rows[None, :],
                            mask=inside & row_mask,
                            other=0.0,
                        ).to(tl.float32)
                    if WEIGHTED:
                        columns *= weight
                    sums += tl.sum(columns, axis=0)
                tl.store(sums_ptr + item * ROWS + tl.arange(0, ROWS), sums)


@triton.jit
def _two_sum(a, b):
    # The sum, and exactly what rounding took from it.
    total = a + b
    grown = total - a
    return total, (a - (total - grown)) + (b - grown)


@triton.jit(do_not_specialize=["full", "full_parts", "splits", "weight"])
def _merge_kernel(
    h_ptr,
    residual_ptr,
    sum_x_ptr,
    parts_ptr,
    sums_ptr,
    units_ptr,
    n,
    weight,
    full,
    full_parts,
    splits,
    HAS_SUM: tl.constexpr,
    COMPENSATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
):
    unit = tl.program_id(0)
    parts = full_parts
    slot = unit
    step = full
    if unit >= full:
        parts = splits
        slot = full * full_parts + (unit - full) * splits
        step = 1
    entry = tl.load(units_ptr + 4 * unit).to(tl.int64)
    row = tl.program_id(1) // (COLS // TILE) * TILE + tl.arange(0, TILE)
    col = tl.program_id(1) % (COLS // TILE) * TILE + tl.arange(0, TILE)
    i = tl.load(units_ptr + 4 * unit + 1) * ROWS + row
    j = tl.load(units_ptr + 4 * unit + 2) * COLS + col
    lower = (i[:, None] >= j[None, :]) & (i < n)[:, None] & (j < n)[None, :]

    added = tl.zeros((TILE, TILE), dtype=tl.float32)
    lost = tl.zeros((TILE, TILE), dtype=tl.float32)
    for part in range(0, parts):
        place = (slot + part * step).to(tl.int64) * (ROWS * COLS)
        more = tl.load(
            parts_ptr + place + row[:, None] * COLS + col[None, :], mask=lower, other=0.0
        )
        if COMPENSATED:
            added, error = _two_sum(added, more)
            lost += error
        else:
            added += more
    added *= weight
    wide = tl.cast(n, tl.int64)
    h_ptr += entry * wide * wide
    target = h_ptr + i[:, None].to(tl.int64) * wide + j[None, :]
    before = tl.load(target, mask=lower, other=0.0)
    if COMPENSATED:
        # Errors: of H_ij (i > j) at H_ji, which nobody reads before it is finalised; of the
        # diagonal and of the column sum in the rows of the residual.
        after, error = _two_sum(before, added)
        lost = lost * weight + error
        tl.store(target, after, mask=lower)
        below = lower & (i[:, None] > j[None, :])
        mirror = h_ptr + j[None, :].to(tl.int64) * wide + i[:, None]
        tl.store(mirror, tl.load(mirror, mask=below, other=0.0) + lost, mask=below)
        corner = lower & (i[:, None] == j[None, :])
        on_diagonal = tl.sum(corner.to(tl.int32), axis=1) > 0
        edge = residual_ptr + entry * 2 * wide + i
        lost_there = tl.sum(tl.where(corner, lost, 0.0), axis=1)
        kept = tl.load(edge, mask=on_diagonal, other=0.0)
        tl.store(edge, kept + lost_there, mask=on_diagonal)
    else:
        tl.store(target, before + added, mask=lower)

    if HAS_SUM:
        if (tl.load(units_ptr + 4 * unit + 3) > 0) & (tl.program_id(1) % (COLS // TILE) == 0):
            inside = i < n
            sums = tl.zeros((TILE,), dtype=tl.float32)
            for part in range(0, parts):
                sums += tl.load(sums_ptr + (slot + part * step) * ROWS + row)
            sums *= weight
            place = sum_x_ptr + entry * wide + i
            sums_before = tl.load(place, mask=inside, other=0.0)
            if COMPENSATED:
                sums_after, sums_lost = _two_sum(sums_before, sums)
                tl.store(place, sums_after, mask=inside)
                line = residual_ptr + (entry * 2 + 1) * wide + i
                tl.store(line, tl.load(line, mask=inside, other=0.0) + sums_lost, mask=inside)
            else:
                tl.store(place, sums_before + sums, mask=inside)


def precision(dtype: torch.dtype) -> str:
    """Return Triton's ``input_precision`` for activations of a type."""
    return FLOAT32_PRECISION if dtype == torch.float32 else "ieee"


def launch_update(
    h: Tensor,
    x: Tensor,
    weight: float,
    weights: Tensor | None,
    sum_x: Tensor | None,
    residual: Tensor | None,
    config: Config | None = None,
    programs: int | None = None,
) -> None:
    """Launch the update; see ``hessian_update_`` for the arguments, which it has checked.

    Args:
        h, x, sum_x, residual: (B, n, n), (B, tokens, n), (B, n) and (B, 2, n).
        weight: factor of all that is added.
        weights: (samples,) on the CPU, or None: a further factor of each sample.
        config: what to launch instead of the table's choice.
        programs: how many programs share the work; one for each multiprocessor by default.
    """
    if x.dtype == torch.float64:
        x = x.float()  # H is float32 on CUDA
    tokens = x.shape[1]
    samples = 1 if weights is None else weights.numel()
    per_sample = tokens // samples
    if weights is not None and per_sample > LAUNCH_TOKENS:
        for rows, factor in zip(x.chunk(samples, dim=1), weights.tolist(), strict=True):
            if factor > 0:
                launch_update(h, rows, weight * factor, None, sum_x, residual, config, programs)
        return
    weighted = weights is not None
    config = config or choose_config(x.device, x.dtype, x.shape[2], weighted)
    programs = programs or device_class(x.device)[1]
    order = tile_order(*x.shape[::2], config.rows, config.cols, programs, x.device)
    factors = h if weights is None else weights.to(x.device, torch.float32, non_blocking=True)
    step = LAUNCH_TOKENS if weights is None else LAUNCH_TOKENS // per_sample * per_sample
    for begin in range(0, tokens, step):
        rows = x[:, begin : begin + step]
        count = 1 if weights is None else rows.shape[1] // per_sample
        first = begin // per_sample if weighted else 0
        for units in windows(order, config, programs, rows.shape[1]):
            plan = make_plan(len(units), rows.shape[1], count, programs, config)
            _launch(
                h, rows, weight, sum_x, factors[first:], residual, weighted, units, plan, config
            )


def tune(
    device: torch.device, dtype: torch.dtype, n: int, tokens: int, weighted: bool
) -> dict[str, float]:
    """Time the candidates of a use on a device; see ``tune_hessian``."""
    x = torch.randn(1, tokens, n, device=device, dtype=torch.float32).to(dtype)
    h = torch.zeros(1, n, n, device=device)
    sum_x, residual = torch.zeros(1, n, device=device), torch.zeros(1, 2, n, device=device)
    weights = torch.ones(1) if weighted else None

    def milliseconds(config: Config) -> float:
        times = []
        for _ in range(8):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launch_update(h, x, 1.0, weights, sum_x, residual, config)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return sorted(times[3:])[2]  # the first launches compile and warm up

    times = remember_fastest(x.device, dtype, n, weighted, milliseconds)
    return {str(config): time for config, time in times.items()}


def _launch(
    h: Tensor,
    x: Tensor,
    weight: float,
    sum_x: Tensor | None,
    factors: Tensor,
    residual: Tensor | None,
    weighted: bool,
    units: Tensor,
    plan: Plan,
    config: Config,
) -> None:
    parts = torch.empty(plan.items, config.rows, config.cols, dtype=torch.float32, device=x.device)
    sums = parts if sum_x is None else parts.new_empty(plan.items, config.rows)
    _product_kernel[(min(plan.programs, plan.items),)](
        parts,
        sums,
        x,
        units,
        factors,
        x.shape[2],
        x.stride(0),
        x.stride(1),
        plan.per_sample,
        plan.samples,
        plan.full,
        plan.full_parts,
        plan.splits,
        plan.items,
        plan.chunk,
        plan.tail_chunk,
        HAS_SUM=sum_x is not None,
        WEIGHTED=weighted,
        TWO_SUMS=config.two_sums,
        ROWS=config.rows,
        COLS=config.cols,
        TOKENS=config.tokens,
        PRECISION=precision(x.dtype),
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,  # the default of Triton 3.10 is not, and 3.9 warns about it
    )
    tile = min(MERGE_TILE, config.rows)
    _merge_kernel[(len(units), (config.rows // tile) * (config.cols // tile))](
        h,
        h if residual is None else residual,
        h if sum_x is None else sum_x,
        parts,
        sums,
        units,
        x.shape[2],
        weight,
        plan.full,
        plan.full_parts,
        plan.splits,
        HAS_SUM=sum_x is not None,
        COMPENSATED=residual is not None,
        ROWS=config.rows,
        COLS=config.cols,
        TILE=tile,
        num_warps=8,
        enable_fp_fusion=False,  # a fused weight * part + H has another error than two_sum finds
    )
