"""Run the Triton kernels of the Hessian update in the interpreter against the reference.

A program of its own, since TRITON_INTERPRET has to be set before triton is imported. With the
argument ``all`` it runs every configuration, split and feature; without, a few of each.
"""

import sys

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mosaic_kernels._compensated import finalize_torch
from mosaic_kernels._triton import hessian, hessian_plan
from mosaic_kernels._triton.hessian_configs import TABLE
from mosaic_kernels._triton.hessian_plan import Config
from mosaic_kernels.ref import hessian_ref

multiply = InterpreterBuilder.create_dot


def multiply_bfloat16(self, a, b, d, *rest):
    """The interpreter keeps bfloat16 as bits, and its product would multiply those."""

    def widen(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        bits = np.asarray(handle.data).astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    return multiply(self, widen(a), widen(b), d, *rest)


InterpreterBuilder.create_dot = multiply_bfloat16


def check(actual, by_torch, truth):
    error, known = (actual - truth).abs().max(), (by_torch - truth).abs().max()
    rounding = torch.finfo(torch.float32).eps * truth.abs().max()
    assert error <= 2 * known + 2 * rounding, f"error {error:.3g}, torch's own {known:.3g}"


def compare(
    dtype, tokens, n, config=None, programs=7, samples=0, compensated=True, batch=1, with_sum=True
):
    """Two updates of other lengths, finalised, against float64; twice, for the same bits."""
    case = (dtype, tokens, n, config, programs, samples, compensated, batch, with_sum)
    generator = torch.Generator().manual_seed(tokens + n)
    x = torch.randn(batch, 2 * tokens, n + 3, generator=generator).to(dtype)[..., :n]
    weights = torch.rand(samples, generator=generator) if samples else None
    if samples > 1:
        weights[1] = 0
    batches = [(x[:, :tokens], 0.5), (x[:, tokens:], 1.25), (x.flip(1), 1.0)]
    results = []
    for _ in range(2):
        h, sum_x = torch.zeros(batch, n, n), torch.zeros(batch, n)
        residual = torch.zeros(batch, 2, n) if compensated else None
        for rows, weight in batches:
            total = sum_x if with_sum else None
            hessian.launch_update(h, rows, weight, weights, total, residual, config, programs)
        if compensated:
            assert n == 1 or h.triu(1).any() or tokens < 9, case  # the errors are kept
        finalize_torch(h, 1.0, sum_x, residual)
        results.append((h, sum_x))
    assert all(map(torch.equal, *results)), case
    for entry in range(batch):
        factors = [w if weights is None else w * weights for _, w in batches]
        pairs = [(rows[entry], factor) for (rows, _), factor in zip(batches, factors, strict=True)]
        by_torch, torch_sum = torch.zeros(n, n), torch.zeros(n)
        for rows, factor in pairs:
            each = torch.as_tensor(factor).reshape(-1, 1).float()
            each = each.repeat_interleave(len(rows) // len(each), 0)
            by_torch += rows.float().T @ (each * rows.float())
            torch_sum += (each * rows.float()).sum(0)
        truth, truth_sum, _ = hessian_ref(pairs, n)
        check(h[entry].double(), by_torch.double(), truth)
        if with_sum:
            check(sum_x[entry].double(), torch_sum.double(), truth_sum)


SMALL = Config(16, 32, 16, 4, 2, False)
SMALL_TWO = Config(16, 16, 16, 4, 2, True)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def few():
    for dtype, (tokens, n) in zip(FLOATS, [(33, 70), (65, 129), (100, 40), (1, 5)], strict=True):
        compare(dtype, tokens, n)
        compare(dtype, tokens, n, SMALL, compensated=False)
    compare(torch.float32, 60, 70, SMALL_TWO, samples=5, batch=2)
    compare(torch.bfloat16, 40, 33, SMALL_TWO, samples=2, with_sum=False)


def every():
    for i, (use, bits, config) in enumerate(
        sorted(
            {(*key, config) for table in TABLE.values() for key in table for config in table[key]},
            key=str,
        )
    ):
        dtypes = (torch.float32, torch.float64) if bits == 32 else (torch.bfloat16, torch.float16)
        samples = 2 if use == "two sums" else 0
        compare(dtypes[i % 2], 70, 150, config, samples=samples, compensated=i % 3 > 0)
    # Splits: few and many programs for the tiles, one and several partial sums of an item.
    for chunk in (16, 8192):
        hessian_plan.CHUNK_TOKENS = chunk
        for config in (SMALL, SMALL_TWO):
            for tokens, n, programs in [(1, 1, 5), (200, 20, 132), (150, 33, 1), (97, 65, 5)]:
                compare(torch.float32, tokens, n, config, programs, compensated=n % 2 == 1)
        for samples, tokens in [(3, 210), (7, 77), (50, 50)]:
            compare(torch.bfloat16, tokens, 50, SMALL_TWO, 5, samples)
        compare(torch.float32, 200, 20, SMALL_TWO, 132, 2, batch=3)
    # Several launches: a workspace of three tiles, and tokens two partial sums at a time.
    hessian_plan.WORKSPACE_BYTES = 3 * 4 * 16 * 32 * 4
    hessian_plan.CHUNK_TOKENS, hessian.LAUNCH_TOKENS = 16, 32
    for config in (SMALL, SMALL_TWO):
        compare(torch.float32, 90, 60, config, programs=2, batch=2)
    for samples in (3, 30):
        compare(torch.float32, 90, 40, SMALL_TWO, programs=2, samples=samples)


every() if sys.argv[1:] == ["all"] else few()
print("the interpreter agrees")
