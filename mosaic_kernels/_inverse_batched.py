"""The inverse of a batch of matrices, or of their factors, by torch's batched products.

By halves: with A = L L^T, L21 = A21 L11^-T, A22 -= L21 L21^T, (L^-1)21 = -L22^-1 L21 L11^-1, down
to blocks that a leaf inverts; then A^-1 = L^-T L^-1. Triangular operands and symmetric results
are cut into rows of about 512, so that the work is 0.65 n^3 multiply-adds instead of 1.2.

Every operand is a view with rows of stride 1 or its transpose, and every product is written
where it belongs: cuBLAS takes such views as they are, no hidden copy is made. 28 matrices of 4608
columns are 36 leaves, 189 products and 85 other launches (zeroing, mirroring): 2 ms of launches
beside 3.5e12 operations, about 80 ms at 45e12 a second. 99.6% of the operations are in products
of at least 256 rows, columns and depth. (Counted, not timed.)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mosaic_kernels import _products
from mosaic_kernels._extension import EXTENSION

LEAF = 128  # columns of a block, but for the GPU's, which have to fit into shared memory

#: Replaces the (B, w, w) view of a block A = L L^T by L^-1, lower; sets ``failed`` (B,) and leaves
#: the identity where L does not exist, so that nothing that is not a number spreads.
Leaf = Callable[[Tensor, Tensor], None]


def leaf_torch(block: Tensor, failed: Tensor) -> None:
    """Invert the factors of a batch of blocks with torch's operators."""
    factor, info = torch.linalg.cholesky_ex(block)
    bad = (info != 0) | ~torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all(-1)
    identity = torch.eye(block.shape[-1], dtype=block.dtype, device=block.device)
    factor = torch.where(bad[:, None, None], identity, factor)
    block.copy_(torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False))
    failed.logical_or_(bad)


def leaf_cuda(block: Tensor, failed: Tensor) -> None:
    """Invert the factors of a batch of blocks with the compiled kernel, in shared memory."""
    assert EXTENSION.module is not None
    EXTENSION.module.invert_factor_cuda(
        block.data_ptr(),
        block.shape[0],
        block.shape[1],
        block.stride(0),
        block.stride(1),
        failed.data_ptr(),
        block.element_size(),
        block.device.index,
        torch.cuda.current_stream(block.device).cuda_stream,
    )


def leaf_for(h: Tensor) -> tuple[Leaf, int]:
    """Return the leaf for a batch, and the widest block it takes."""
    if h.is_cuda and EXTENSION.module is not None and EXTENSION.has_cuda:
        return leaf_cuda, EXTENSION.module.factor_width_cuda(h.element_size(), h.device.index)
    return leaf_torch, LEAF


def inverse_factor_(a: Tensor, failed: Tensor, leaf: Leaf, width: int) -> None:
    """Replace the lower triangle of (B, n, n) A = L L^T by L^-1; the upper becomes zero.

    Args:
        a: the matrices, or a view of diagonal blocks of larger ones; rows of stride 1.
        failed: (B,) bool, set where A has no factor; its result is then finite but worthless.
        leaf: what inverts the factor of a small block.
        width: the widest block for ``leaf``.
    """
    n = a.shape[-1]
    if n <= width:
        leaf(a, failed)
        return
    half = (n // 2 + width - 1) // width * width
    top, below, bottom = a[:, :half, :half], a[:, half:, :half], a[:, half:, half:]
    inverse_factor_(top, failed, leaf, width)
    side = a.new_empty(below.shape)  # L21 = A21 L11^-T
    for begin, end in _products.blocks(half):
        torch.bmm(below[..., :end], top[:, begin:end, :end].mT, out=side[..., begin:end])
    for begin, end in _products.blocks(n - half):  # A22 -= L21 L21^T
        rows = bottom[:, begin:end, :end]
        rows.baddbmm_(side[:, begin:end], side[:, :end].mT, alpha=-1)
    inverse_factor_(bottom, failed, leaf, width)
    product = torch.empty_like(side)  # L21 L11^-1
    for begin, end in _products.blocks(half):
        torch.bmm(side[..., begin:], top[:, begin:, begin:end], out=product[..., begin:end])
    for begin, end in _products.blocks(n - half):
        rows = below[:, begin:end]
        rows.baddbmm_(bottom[:, begin:end, :end], product[:, :end], beta=0, alpha=-1)
    a[:, :half, half:] = 0


def inverse_factors(damped: Tensor, failed: Tensor) -> Tensor:
    """Return L^-1, lower, of (B, n, n) matrices A = L L^T, which it overwrites.

    See ``_damping.Attempt``. On the CPU one compiled call.
    """
    if damped.device.type != "cpu" or EXTENSION.module is None:
        inverse_factor_(damped, failed, *leaf_for(damped))
        return damped
    out = torch.zeros_like(damped)
    EXTENSION.module.invert_factors(
        damped.data_ptr(),
        out.data_ptr(),
        damped.shape[0],
        damped.shape[1],
        failed.data_ptr(),
        damped.element_size(),
        torch.get_num_threads(),
    )
    return out


def gram_(lower: Tensor, out: Tensor) -> None:
    """Write L^T L, symmetric, of lower triangular (B, n, n) L into ``out``."""
    for begin, end in _products.blocks(lower.shape[-1]):
        left = lower[:, begin:, begin:end].mT
        torch.bmm(left, lower[:, begin:, :end], out=out[:, begin:end, :end])
    _products.mirror_lower_(out)


def invert_by_factors(damped: Tensor, failed: Tensor) -> Tensor:
    """Return the inverses of (B, n, n) matrices, which it overwrites; see ``_damping.Attempt``."""
    inverse_factor_(damped, failed, *leaf_for(damped))
    inverse = torch.empty_like(damped)
    gram_(damped, inverse)
    return inverse
