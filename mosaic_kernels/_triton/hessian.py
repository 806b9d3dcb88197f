"""The Hessian update on CUDA: lower tiles of H += w X^T X, and sum_x += w X^T 1, in one launch."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Tile of H, tokens read at once, and how the kernel is launched.

    Args:
        tile: rows and columns of the tile of H that a program owns.
        tokens: tokens in one step of the product.
        warps: warps of a program.
        stages: steps of tokens in flight.
    """

    tile: int
    tokens: int
    warps: int
    stages: int


# 16-bit inputs run on tensor cores: a 128 x 128 tile keeps its 64 accumulators a thread in
# registers with 8 warps; 3 stages of 2 x 16 KiB fit the 99 KiB of the smallest chip. float32
# inputs are multiplied in full precision, by the ordinary cores.
WIDE = {
    torch.bfloat16: Config(tile=128, tokens=64, warps=8, stages=3),
    torch.float16: Config(tile=128, tokens=64, warps=8, stages=3),
    torch.float32: Config(tile=64, tokens=16, warps=8, stages=2),
}
# Below this width there are fewer wide tiles than a large GPU has multiprocessors.
NARROW_COLUMNS = 2048
NARROW = {
    torch.bfloat16: Config(tile=64, tokens=64, warps=4, stages=3),
    torch.float16: Config(tile=64, tokens=64, warps=4, stages=3),
    torch.float32: Config(tile=32, tokens=32, warps=4, stages=2),
}


@triton.jit
def _update_kernel(
    h_ptr,
    x_ptr,
    sum_ptr,
    tokens,
    n,
    x_stride,
    weight,
    HAS_SUM: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # Program p owns tile (i, j), j <= i, of the lower triangle: p = i (i + 1) / 2 + j. The root
    # is rounded, so it is set right by one.
    p = tl.program_id(0)
    i = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    j = p - i * (i + 1) // 2

    rows = i * TILE + tl.arange(0, TILE)
    cols = j * TILE + tl.arange(0, TILE)
    steps = tl.arange(0, TOKENS)
    row_mask = rows < n
    col_mask = cols < n
    # Long calibration batches pass 2^31 elements: offsets of tokens are 64 bits wide.
    start = steps[:, None].to(tl.int64) * x_stride
    stride = tl.cast(x_stride, tl.int64)
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    for first in range(0, tokens, TOKENS):
        base = x_ptr + first * stride
        inside = (steps < tokens - first)[:, None]
        left = tl.load(base + start + rows[None, :], mask=inside & row_mask[None, :], other=0.0)
        right = tl.load(base + start + cols[None, :], mask=inside & col_mask[None, :], other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")

    tile = h_ptr + rows[:, None].to(tl.int64) * n + cols[None, :]
    tile_mask = row_mask[:, None] & col_mask[None, :]
    tl.store(tile, tl.load(tile, mask=tile_mask, other=0.0) + weight * acc, mask=tile_mask)

    # The programs of the diagonal sum their columns in a second loop, from the L2 cache: inside
    # the first loop the sum would pull every operand of the product through registers.
    if HAS_SUM:
        if i == j:
            total = tl.zeros((TILE,), dtype=tl.float32)
            for first in range(0, tokens, TOKENS):
                inside = (steps < tokens - first)[:, None]
                part = tl.load(
                    x_ptr + first * stride + start + cols[None, :],
                    mask=inside & col_mask[None, :],
                    other=0.0,
                )
                total += tl.sum(part.to(tl.float32), axis=0)
            sums = tl.load(sum_ptr + cols, mask=col_mask, other=0.0)
            tl.store(sum_ptr + cols, sums + weight * total, mask=col_mask)


def choose_config(dtype: torch.dtype, n: int) -> Config:
    """Return the launch configuration for inputs of this type and width."""
    return (NARROW if n < NARROW_COLUMNS else WIDE)[dtype]


def launch_update(h: Tensor, x: Tensor, weight: float, sum_x: Tensor | None) -> None:
    """Launch the update; see ``hessian_update_`` for the arguments, which it has checked."""
    if x.dtype == torch.float64:
        x = x.float()  # H is float32 on CUDA
    n = h.shape[0]
    config = choose_config(x.dtype, n)
    tiles = triton.cdiv(n, config.tile)
    _update_kernel[(tiles * (tiles + 1) // 2,)](
        h,
        x,
        h if sum_x is None else sum_x,
        x.shape[0],
        n,
        x.stride(0),
        weight,
        HAS_SUM=sum_x is not None,
        TILE=config.tile,
        TOKENS=config.tokens,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,  # the default of Triton 3.10 is not, and 3.9 warns about it
    )
