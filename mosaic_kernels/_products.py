"""Batched products of triangular and symmetric matrices.

Half of a symmetric result is enough. On the CPU the compiled ``add_product`` computes just that
half; elsewhere torch's dense products do, in blocks that leave out most of what is not needed.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mosaic_kernels._extension import EXTENSION

BLOCK = 512
ALIGN = 16  # rows of a block start on a cache line


def blocks(n: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a cut of n rows into blocks of nearly equal size.

    A thin rest would run as a matrix-vector product: slower, and three times less accurate.
    """
    parts = -(-n // BLOCK)
    bounds = [min(n, -(-n * i // (parts * ALIGN)) * ALIGN) for i in range(parts + 1)]
    yield from pairwise(bounds)


#: mosaic::Element of csrc/cpu/product.h.
ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

Pair = tuple[Tensor, Tensor]


def add_product_lower_(c: Tensor, *terms: Pair, alpha: float = 1.0) -> None:
    """Add alpha * (P^T Q + ...) to the lower triangle of C; the upper one is left undefined.

    Args:
        c: (B, n, n) or (n, n) float32 or float64, unit stride along rows.
        terms: pairs of P and Q, (B, k, n) or (k, n) each, with a symmetric sum of P^T Q. On the
            CPU with the compiled module they may be narrower than a float32 ``c``: they are
            widened as they are read.
        alpha: factor of the products.
    """
    if c.device.type == "cpu" and EXTENSION.module is not None:
        _add_cpp(c, terms, alpha)
        return
    # One pass over C, which is what a product of little depth waits for.
    p, q = (
        terms[0] if len(terms) == 1 else (torch.cat(side, -2) for side in zip(*terms, strict=True))
    )
    for begin, end in blocks(c.shape[-1]):
        target = c[..., begin:end, :end]
        left, right = p[..., begin:end].mT, q[..., :end]
        if c.dim() == 2:
            target.addmm_(left, right, alpha=alpha)
        else:
            target.baddbmm_(left, right, alpha=alpha)


def widens(c: Tensor, x: Tensor) -> bool:
    """Tell whether ``add_product_lower_`` takes ``x`` as it is for a result in ``c``."""
    if x.dtype == c.dtype:
        return True
    compiled = c.device.type == "cpu" and EXTENSION.module is not None
    return compiled and c.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)


def product(p: Tensor, q: Tensor) -> Tensor:
    """Return P^T Q for (k, m) P and (k, n) Q of one type, float32 or float64."""
    if p.device.type == "cpu" and EXTENSION.module is not None:
        c = q.new_zeros(p.shape[1], q.shape[1])
        if c.numel() and p.shape[0]:
            _call_cpp(c, ((p, q),), 1.0, lower=False)
        return c
    return p.mT @ q


def _add_cpp(c: Tensor, terms: tuple[Pair, ...], alpha: float) -> None:
    if c.dim() == 2:
        _call_cpp(c, terms, alpha, lower=True)
        return
    for b in range(c.shape[0]):
        _call_cpp(c[b], tuple((p[b], q[b]) for p, q in terms), alpha, lower=True)


def _call_cpp(c: Tensor, terms: tuple[Pair, ...], alpha: float, lower: bool) -> None:
    assert EXTENSION.module is not None

    def operand(x: Tensor) -> tuple[int, int, int, int]:
        return x.data_ptr(), ELEMENTS[x.dtype], x.stride(0), x.stride(1)

    EXTENSION.module.add_product(
        c.data_ptr(),
        c.stride(0),
        [(operand(p), operand(q), p.shape[0]) for p, q in terms if p.shape[0]],
        c.shape[0],
        c.shape[1],
        alpha,
        lower,
        c.element_size(),
        torch.get_num_threads(),
    )


def pack_square(matrix: Tensor, columns: Tensor, in_place: bool = False) -> Tensor:
    """Return the rows and columns ``columns`` (B, k), ascending, of (B, n, n) lower triangles.

    ``in_place``: the memory of ``matrix`` may be used for the result.
    """
    batch, n = matrix.shape[:2]
    count = columns.shape[1]
    if matrix.device.type == "cpu" and EXTENSION.module is not None and count:
        out = matrix.flatten()[: batch * count * count] if in_place else matrix.new_empty(
            batch * count * count
        )  # fmt: skip
        EXTENSION.module.pack_lower(
            matrix.data_ptr(),
            out.data_ptr(),
            batch,
            n,
            columns.data_ptr(),
            count,
            matrix.element_size(),
        )
        return out.view(batch, count, count)
    taken = [m.index_select(0, c).index_select(1, c) for m, c in zip(matrix, columns, strict=True)]
    return torch.stack(taken)


def mirror_lower_(h: Tensor) -> None:
    """Copy the lower triangle of (..., n, n) into the upper one, whatever is there."""
    for begin, end in blocks(h.shape[-1]):
        corner = h[..., begin:end, begin:end]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        h[..., begin:end, end:] = h[..., end:, begin:end].mT
