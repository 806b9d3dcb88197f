"""Sums of matrices that keep what rounding takes from them, and their finalisation.

Where only the lower triangle of a symmetric sum is formed, the upper one has room for the errors:
that of H_ij (i > j) is kept at H_ji, and those of the diagonal in a vector beside it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mosaic_kernels import _products
from mosaic_kernels._extension import EXTENSION


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return fl(a + b) and exactly what rounding took from it."""
    total = a + b
    grown = total - a
    return total, (a - (total - grown)) + (b - grown)


def add_compensated_torch(h: Tensor, part: Tensor, residual: Tensor) -> None:
    """Add the lower triangle of part to h; errors to the upper triangle of h and to residual."""
    for begin, end in _products.blocks(h.shape[-1]):
        rows = h[begin:end, :end]
        total, lost = two_sum(rows, part[begin:end, :end])
        h[:end, begin:end] += lost.tril(begin - 1).mT
        rows.copy_(total.tril(begin) + rows.triu(begin + 1))
        residual[begin:end] += lost.diagonal(begin)


def add_compensated_cpp(h: Tensor, part: Tensor, residual: Tensor) -> None:
    """Do the same in one pass over both matrices."""
    assert EXTENSION.module is not None
    EXTENSION.module.add_compensated_lower(
        h.data_ptr(),
        part.data_ptr(),
        residual.data_ptr(),
        h.shape[0],
        h.element_size(),
        torch.get_num_threads(),
    )


ADD_COMPENSATED_CPU: Callable[[Tensor, Tensor, Tensor], None] = (
    add_compensated_torch if EXTENSION.module is None else add_compensated_cpp
)


def _finalize_sum(sum_x: Tensor | None, total_weight: float, residual: Tensor | None) -> None:
    if sum_x is not None:
        if residual is not None:
            sum_x.add_(residual[:, 1])
        sum_x.div_(total_weight)


def finalize_torch(
    h: Tensor, total_weight: float, sum_x: Tensor | None, residual: Tensor | None
) -> None:
    """Add the errors, divide and mirror (B, n, n) sums with torch's operators, block by block."""
    if residual is not None:
        for begin, end in _products.blocks(h.shape[-1]):
            h[:, begin:end, :end] += h[:, :end, begin:end].mT.tril(begin - 1)
        h.diagonal(dim1=-2, dim2=-1).add_(residual[:, 0])
    h.div_(total_weight)
    _products.mirror_lower_(h)
    _finalize_sum(sum_x, total_weight, residual)


def finalize_cpp(
    h: Tensor, total_weight: float, sum_x: Tensor | None, residual: Tensor | None
) -> None:
    """Do the same with the compiled mirror: one pass over each matrix."""
    assert EXTENSION.module is not None
    for entry in range(h.shape[0]):
        EXTENSION.module.mirror_lower(
            h[entry].data_ptr(),
            h.shape[-1],
            total_weight,
            h.element_size(),
            torch.get_num_threads(),
            residual=0 if residual is None else residual[entry].data_ptr(),
        )
    _finalize_sum(sum_x, total_weight, residual)


FINALIZE_CPU: Callable[[Tensor, float, Tensor | None, Tensor | None], None] = (
    finalize_torch if EXTENSION.module is None else finalize_cpp
)
