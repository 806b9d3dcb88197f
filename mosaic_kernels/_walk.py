"""The blocked sweep: walks through blocks of columns, and torch's products between them.

Left to right, each pruned weight pushes its error to the columns on its right. Inside a block a
walk does that at once; beyond it a product of matrices does it for many columns together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mosaic_kernels._extension import EXTENSION

# The walk of a block takes 0.3 us a row and the choice of its mask as long: for fewer rows than
# this another thread gains little, and on cores that other work keeps busy waiting for it costs
# milliseconds.
ROWS_PER_THREAD = 4096


@dataclass
class State:
    """A batch of layers in the middle of a sweep, with contiguous tensors.

    Args:
        weight: (B, m, n), current weights; float32 or float64.
        factor: (B, n, n), U in the same type, upper, H^-1 = U^T U.
        mask: (B, m, n) bool, True where a weight is kept.
        errors: (B, n, m), what each removal pushes to the right: w / U_jj, or zero.
        losses: (B, m) float64, the squared errors so far.
        dead: (B, n) bool, columns whose weights go before any other.
        keep, of: weights that are kept of every ``of``; both 0 where ``choose`` gives the mask.
    """

    weight: Tensor
    factor: Tensor
    mask: Tensor
    errors: Tensor
    losses: Tensor
    dead: Tensor
    keep: int
    of: int


@dataclass(frozen=True)
class Steps:
    """How one block, columns [begin, end), is done.

    Args:
        choose: (state, begin, end, count): sets the mask so that the ``count`` (B,) weights of
            least |W_ij| / U_jj go, the first of equals first.
        walk: (state, begin, end): prunes and compensates the block, and fills its errors.
    """

    choose: Callable[[State, int, int, Tensor], None]
    walk: Callable[[State, int, int], None]


def sweep(state: State, counts: Tensor, block_size: int, steps: Steps) -> None:
    """Walk through all blocks of ``block_size`` columns; nothing asks the device.

    Args:
        state: the layers before the sweep; weight, mask, errors and losses are written.
        counts: (blocks, B) int64, weights to remove; not read where the state has a pattern.
        block_size: columns of a block, a multiple of ``state.of``.
        steps: see there.
    """
    n = state.weight.shape[2]
    edges = [*range(0, n, block_size), n]
    blocks = list(pairwise(edges))

    def run(first: int, last: int) -> None:
        if last - first == 1:
            begin, end = blocks[first]
            if state.of == 0:
                steps.choose(state, begin, end, counts[first])
            steps.walk(state, begin, end)
            return
        # By halves, as the Cholesky factor is built: fewer and deeper products than one for each
        # block, which would read and write the rest of the weights every time.
        middle = (first + last) // 2
        run(first, middle)
        push_right(state, edges[first], edges[middle], edges[last])
        run(middle, last)

    run(0, len(blocks))


def push_right(state: State, begin: int, cut: int, end: int) -> None:
    """Take the errors of the columns [begin, cut) out of the columns [cut, end)."""
    target = state.weight[:, :, cut:end]
    errors, factor = state.errors[:, begin:cut].mT, state.factor[:, begin:cut, cut:end]
    if target.shape[0] == 1:
        target[0].addmm_(errors[0], factor[0], alpha=-1)
    else:
        target.baddbmm_(errors, factor, alpha=-1)


def choose_torch(state: State, begin: int, end: int, count: Tensor) -> None:
    """Choose the mask of a block by a stable sort; see ``Steps.choose``."""
    diagonal = state.factor.diagonal(dim1=-2, dim2=-1)[:, None, begin:end]
    # The order of |W_ij| / U_jj is that of its square, which could overflow.
    scores = state.weight[:, :, begin:end].abs() / diagonal
    scores.masked_fill_(state.dead[:, None, begin:end], -1)
    order = scores.flatten(1).argsort(dim=1, stable=True)
    kept = torch.arange(order.shape[1], device=order.device) >= count[:, None]
    mask = torch.empty_like(kept).scatter_(1, order, kept)
    state.mask[:, :, begin:end] = mask.view(scores.shape)


def choose_group(state: State, begin: int, end: int) -> None:
    """Choose the mask of one N:M group, columns [begin, end), from its current weights."""
    diagonal = state.factor.diagonal(dim1=-2, dim2=-1)[:, None, begin:end]
    scores = state.weight[:, :, begin:end].abs() / diagonal
    order = scores.argsort(dim=2, stable=True)
    kept = torch.arange(end - begin, device=order.device) >= state.of - state.keep
    mask = torch.empty_like(order, dtype=torch.bool).scatter_(2, order, kept.expand_as(order))
    state.mask[:, :, begin:end] = mask


def walk_torch(state: State, begin: int, end: int) -> None:
    """Walk through a block with batched torch operators: some eight launches for each column."""
    for j in range(begin, end):
        if state.of and (j - begin) % state.of == 0:
            choose_group(state, j, j + state.of)
        kept, row = state.mask[:, :, j], state.factor[:, j, j:end]
        error = (state.weight[:, :, j] / row[:, :1]).masked_fill(kept, 0)
        state.errors[:, j] = error
        state.weight[:, :, j:end] -= error[:, :, None] * row[:, None, :]
        state.weight[:, :, j].masked_fill_(~kept, 0)  # exactly, not to a rounding
    # In the type of H within a block, as the compiled walks sum.
    state.losses += state.errors[:, begin:end].square().sum(1)


def threads_for(state: State) -> int:
    """Return how many threads a block is worth."""
    rows = state.weight.shape[0] * state.weight.shape[1]
    return min(torch.get_num_threads(), max(rows // ROWS_PER_THREAD, 1))


def choose_cpp(state: State, begin: int, end: int, count: Tensor) -> None:
    """Choose the mask of a block with the compiled selection (OpenMP over layers)."""
    assert EXTENSION.module is not None
    batch, m, n = state.weight.shape
    arrays = (state.weight, state.factor, state.dead, count, state.mask)
    EXTENSION.module.choose_weights(
        [array.data_ptr() for array in arrays],
        batch,
        [m, n, begin, end - begin],
        state.weight.element_size(),
        threads_for(state),
    )


def addresses(state: State) -> list[int]:
    """Return the addresses of the arrays of a walk, in the order of the bindings."""
    arrays = (state.weight, state.factor, state.mask, state.errors, state.losses)
    return [array.data_ptr() for array in arrays]


def walk_cpp(state: State, begin: int, end: int) -> None:
    """Walk through a block with the compiled walk (OpenMP over the rows of all layers)."""
    assert EXTENSION.module is not None
    batch, m, n = state.weight.shape
    EXTENSION.module.sweep_block(
        addresses(state),
        batch,
        [m, n, begin, end - begin],
        state.keep,
        state.of,
        state.weight.element_size(),
        threads_for(state),
    )


def walk_cuda(state: State, begin: int, end: int) -> None:
    """Walk through a block with the CUDA kernel, one thread a row."""
    assert EXTENSION.module is not None
    batch, m, n = state.weight.shape
    device = state.weight.device
    EXTENSION.module.sweep_block_cuda(
        addresses(state),
        batch,
        [m, n, begin, end - begin],
        state.keep,
        state.of,
        state.weight.element_size(),
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )


STEPS_TORCH = Steps(choose_torch, walk_torch)
STEPS_CPU = STEPS_TORCH if EXTENSION.module is None else Steps(choose_cpp, walk_cpp)
STEPS_CUDA = Steps(choose_torch, walk_cuda if EXTENSION.has_cuda else walk_torch)
