"""Run the Triton kernel of the Hessian update in the interpreter against the reference.

A program of its own, since TRITON_INTERPRET has to be set before triton is imported.
"""

import itertools

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mosaic_kernels._triton import hessian
from mosaic_kernels.ref import hessian_ref

SHAPES = [(1, 1), (1, 5), (100, 70), (65, 130), (33, 129), (70, 270)]
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


def compare(dtype, tokens, n, padding, with_sum):
    x = torch.randn(tokens, n + padding).to(dtype)[:, :n]
    batches = [(x, 0.5), (x.flip(0).contiguous(), 1.25)]
    h, sum_x = torch.zeros(n, n), torch.zeros(n)
    by_torch, torch_sum = torch.zeros(n, n), torch.zeros(n)
    for rows, weight in batches:
        hessian.launch_update(h, rows, weight, sum_x if with_sum else None)
        by_torch += weight * rows.float().T @ rows.float()
        torch_sum += weight * rows.float().sum(0)
    truth, truth_sum, _ = hessian_ref(batches, n)
    check(h.tril().double(), by_torch.tril().double(), truth.tril())
    if with_sum:
        check(sum_x.double(), torch_sum.double(), truth_sum)


def main():
    torch.manual_seed(0)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for hessian.NARROW_COLUMNS in (0, 2048):  # the wide tiles, then the narrow ones
        for dtype, (tokens, n) in itertools.product(dtypes, SHAPES):
            compare(dtype, tokens, n, padding=3, with_sum=tokens % 2 == 1 or n > 200)
    print("the interpreter agrees")


main()
