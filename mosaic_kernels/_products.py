"""Batched products of triangular and symmetric matrices, by blocks of torch's dense products.

Half of a symmetric result is enough, and half of a triangular operand is zero: cutting the
product into blocks leaves out most of what is not needed and keeps the speed of a dense product.
"""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

BLOCK = 512
ALIGN = 16  # rows of a block start on a cache line


def blocks(n: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a cut of n rows into blocks of nearly equal size.

    A thin rest would run as a matrix-vector product: slower, and three times less accurate.
    """
    parts = -(-n // BLOCK)
    bounds = [min(n, -(-n * i // (parts * ALIGN)) * ALIGN) for i in range(parts + 1)]
    yield from pairwise(bounds)


def add_product_lower_(c: Tensor, p: Tensor, q: Tensor, alpha: float) -> None:
    """Add alpha * P^T Q to the lower triangle of C; the upper one is left undefined.

    Args:
        c: (B, n, n) or (n, n).
        p, q: (B, k, n) or (k, n), with P^T Q symmetric.
        alpha: factor of the product.
    """
    for begin, end in blocks(c.shape[-1]):
        target = c[..., begin:end, :end]
        left, right = p[..., begin:end].mT, q[..., :end]
        if c.dim() == 2:
            target.addmm_(left, right, alpha=alpha)
        else:
            target.baddbmm_(left, right, alpha=alpha)


def times_lower_transposed(b: Tensor, lower: Tensor) -> Tensor:
    """Return B L^T for (batch, m, n) B and lower triangular (batch, n, n) L."""
    result = b.new_empty(b.shape)
    for begin, end in blocks(lower.shape[-1]):
        result[..., begin:end] = b[..., :end] @ lower[:, begin:end, :end].mT
    return result


def times_lower(b: Tensor, lower: Tensor) -> Tensor:
    """Return B L for (batch, m, n) B and lower triangular (batch, n, n) L."""
    result = b.new_empty(b.shape)
    for begin, end in blocks(lower.shape[-1]):
        result[..., begin:end] = b[..., begin:] @ lower[:, begin:, begin:end]
    return result


def lower_times(lower: Tensor, b: Tensor) -> Tensor:
    """Return L B for lower triangular (batch, n, n) L and (batch, n, m) B."""
    result = b.new_empty(b.shape)
    for begin, end in blocks(lower.shape[-1]):
        result[:, begin:end] = lower[:, begin:end, :end] @ b[:, :end]
    return result


def lower_gram(lower: Tensor) -> Tensor:
    """Return L^T L, symmetric, for lower triangular (batch, n, n) L."""
    result = lower.new_empty(lower.shape)
    for begin, end in blocks(lower.shape[-1]):
        result[:, begin:end, :end] = lower[:, begin:, begin:end].mT @ lower[:, begin:, :end]
    mirror_lower_(result)
    return result


def mirror_lower_(h: Tensor) -> None:
    """Copy the lower triangle of (..., n, n) into the upper one, whatever is there."""
    for begin, end in blocks(h.shape[-1]):
        corner = h[..., begin:end, begin:end]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        h[..., begin:end, end:] = h[..., end:, begin:end].mT
