"""The blocked elimination: panels of removals, and torch's products between them.

The state is A (inverse of the damped H) and G = W^T W of the columns that are left, lower
triangles only, with their diagonal blocks kept current. A panel removes some groups and returns
U and V; then A -= U^T U and G -= U^T V + V^T U.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mosaic_kernels import _products
from mosaic_kernels._extension import EXTENSION

# Columns of a panel. Wider panels mean fewer passes over A and G, and more work in the pivots,
# whose rows must take in the whole panel so far.
PANEL_COLUMNS = 64
# Removed columns stay in the matrices, as zeros in U and V, until they are this share of them;
# then A and G are packed, a copy that costs less than the products it saves.
PACK_SHARE = 0.125
# A removal from 2304 columns takes 55 us on one thread: on fewer columns than this a barrier for
# each removal gains little, and on cores that other work keeps busy it costs milliseconds.
COLUMNS_PER_THREAD = 4096


@dataclass
class State:
    """The matrices of a batch of layers in the middle of an elimination.

    Args:
        inverse: (B, n, n), A before the panel; lower triangle.
        gram: (B, n, n), G before the panel; lower triangle.
        inverse_blocks: (B, groups, g, g), diagonal blocks of A, current.
        gram_blocks: (B, groups, g, g), diagonal blocks of G, current.
        alive: (B, groups) bool, which groups are left; equally many in each layer.
        index: (B, groups) int64, the group's index in the layer before pruning.
    """

    inverse: Tensor
    gram: Tensor
    inverse_blocks: Tensor
    gram_blocks: Tensor
    alive: Tensor
    index: Tensor

    @property
    def group_size(self) -> int:
        return self.inverse_blocks.shape[-1]


@dataclass
class Panel:
    """What a panel of removals returns.

    Args:
        picked: (B, pivots) int64, positions in the state's groups.
        losses: (B, pivots); not a number from a breakdown on.
        u, v: (B, pivots * g, n); zero in removed columns.
    """

    picked: Tensor
    losses: Tensor
    u: Tensor
    v: Tensor


RunPanel = Callable[[State, int], Panel]
# Takes the losses (B, groups), infinite for groups that are gone; returns the positions (B,) of
# those to remove.
Choose = Callable[[Tensor], Tensor]


def eliminate(
    weight: Tensor, inverse: Tensor, group_size: int, count: int, run_panel: RunPanel
) -> tuple[Tensor, Tensor]:
    """Remove ``count`` groups from each layer; return (order, losses), both (B, count).

    The memory of ``inverse`` is used up. Where A of a layer stops being positive definite, its
    losses are not a number from there on.
    """
    if count == 0:
        return empty_order(inverse, 0)
    return eliminate_from(initial_state(weight, inverse, group_size), count, run_panel)


def empty_order(inverse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (order, losses), both (B, count), to be filled."""
    order = torch.empty(inverse.shape[0], count, dtype=torch.int64, device=inverse.device)
    return order, inverse.new_empty(order.shape)


def eliminate_from(state: State, count: int, run_panel: RunPanel) -> tuple[Tensor, Tensor]:
    """Remove ``count`` groups, at least 1, as ``eliminate`` does; the state is used up."""
    order, losses = empty_order(state.inverse, count)
    width = max(1, PANEL_COLUMNS // state.group_size)
    removed = done = 0
    while True:
        panel = run_panel(state, min(width, count - done))
        pivots = panel.picked.shape[1]
        order[:, done : done + pivots] = state.index.gather(1, panel.picked)
        losses[:, done : done + pivots] = panel.losses
        done += pivots
        removed += pivots
        if done == count:
            broken = torch.isnan(losses).cumsum(1) > 0
            return order, losses.masked_fill(broken, float("nan"))
        if removed >= PACK_SHARE * state.index.shape[1]:
            pack(state, panel, removed)
            removed = 0
        apply(state, panel)


def initial_state(weight: Tensor, inverse: Tensor, group_size: int) -> State:
    """Return the state before the first removal: A as it is, and the lower triangle of W^T W."""
    gram = inverse.new_zeros(inverse.shape)
    _products.add_product_lower_(gram, (weight, weight))
    return state_of(inverse, gram, group_size)


def state_of(inverse: Tensor, gram: Tensor, group_size: int) -> State:
    """Return the state before the first removal, of A and of G = W^T W in its lower triangle."""
    batch, n = inverse.shape[:2]
    groups = n // group_size
    return State(
        inverse.contiguous(),
        gram,
        diagonal_blocks(inverse, group_size),
        diagonal_blocks(gram, group_size),
        torch.ones(batch, groups, dtype=torch.bool, device=inverse.device),
        torch.arange(groups, device=inverse.device).expand(batch, groups),
    )


def diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """Return a copy of the symmetric diagonal blocks (B, n / width, width, width)."""
    batch, n = matrix.shape[:2]
    parts = matrix.reshape(batch, n // width, width, n // width, width)
    lower = parts.diagonal(dim1=1, dim2=3).movedim(-1, 1).tril()
    return (lower + lower.tril(-1).mT).contiguous()


def apply(state: State, panel: Panel) -> None:
    """Take the panel out of A and G: A -= U^T U, G -= U^T V + V^T U."""
    u, v = panel.u, panel.v
    _products.add_product_lower_(state.inverse, (u, u), alpha=-1.0)
    _products.add_product_lower_(state.gram, (u, v), (v, u), alpha=-1.0)


def pack(state: State, panel: Panel, removed: int) -> None:
    """Drop the ``removed`` groups from the state and from the panel's columns."""
    batch = state.alive.shape[0]
    # Every layer of the batch has lost equally many groups: the indices form a rectangle, and
    # its size is known without asking the device.
    rest = state.alive.shape[1] - removed
    kept = state.alive.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :rest]
    offsets = torch.arange(state.group_size, device=kept.device)
    columns = (kept[:, :, None] * state.group_size + offsets).reshape(batch, -1)
    state.inverse = _products.pack_square(state.inverse, columns, in_place=True)
    state.gram = _products.pack_square(state.gram, columns, in_place=True)
    blocks = kept[:, :, None, None].expand(-1, -1, state.group_size, state.group_size)
    state.inverse_blocks = state.inverse_blocks.gather(1, blocks)
    state.gram_blocks = state.gram_blocks.gather(1, blocks)
    state.index = state.index.gather(1, kept)
    state.alive = torch.ones_like(state.index, dtype=torch.bool)
    wanted = columns[:, None, :].expand(-1, panel.u.shape[1], -1)
    panel.u, panel.v = panel.u.gather(2, wanted), panel.v.gather(2, wanted)


def least_loss(losses: Tensor) -> Tensor:
    """Choose the group of least loss in each layer; ties go to the lowest index."""
    return losses.argmin(1)


def panel_torch(state: State, pivots: int, choose: Choose = least_loss) -> Panel:
    """Remove ``pivots`` groups with batched torch operators, without asking the device.

    The same arithmetic as the compiled panel; some thirty small launches for each removal.
    """
    g, (batch, groups) = state.group_size, state.alive.shape
    n = groups * g
    rows = pivots * g
    u, v = state.inverse.new_zeros(2, batch, rows, n).unbind(0)
    picked = torch.empty(batch, pivots, dtype=torch.int64, device=u.device)
    losses = u.new_empty(batch, pivots)
    broken = torch.zeros(batch, dtype=torch.bool, device=u.device)
    entries = torch.arange(batch, device=u.device)
    for k in range(pivots):
        loss = group_losses(state)
        broken = broken | (torch.isnan(loss) & state.alive).any(1)
        # A broken layer goes on with its lowest groups, zero rows and no loss: the others of
        # the batch are not held up, and the caller reports it.
        loss = loss.masked_fill(broken[:, None], 0).masked_fill(~state.alive, float("inf"))
        best = choose(loss)
        picked[:, k] = best
        losses[:, k] = loss[entries, best].masked_fill(broken, float("nan"))
        state.alive[entries, best] = False
        new_u, new_v = pivot_rows(state, best, u[:, : k * g], v[:, : k * g])
        columns = state.alive.repeat_interleave(g, dim=1) & ~broken[:, None]
        new_u = torch.where(columns[:, None, :], new_u, 0)
        new_v = torch.where(columns[:, None, :], new_v, 0)
        u[:, k * g : k * g + g], v[:, k * g : k * g + g] = new_u, new_v
        blocks_u = new_u.reshape(batch, g, groups, g).transpose(1, 2)
        blocks_v = new_v.reshape(batch, g, groups, g).transpose(1, 2)
        cross = blocks_u.mT @ blocks_v
        state.inverse_blocks -= blocks_u.mT @ blocks_u
        state.gram_blocks -= cross + cross.mT
    return Panel(picked, losses, u, v)


def group_losses(state: State) -> Tensor:
    """Return trace(A_SS^-1 G_SS) of each group, at least 0; not a number without a factor."""
    if state.group_size == 1:
        pivot, energy = state.inverse_blocks[..., 0, 0], state.gram_blocks[..., 0, 0]
        return torch.where(pivot > 0, energy.clamp(min=0) / pivot, float("nan"))
    factor, info = torch.linalg.cholesky_ex(state.inverse_blocks)
    solved = torch.cholesky_solve(state.gram_blocks, factor)
    loss = solved.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=0)
    return torch.where((info == 0) & torch.isfinite(loss), loss, float("nan"))


def pivot_rows(state: State, best: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (B, g, n) rows of U and V of the groups ``best``, given the panel so far."""
    g, entries = state.group_size, torch.arange(best.shape[0], device=best.device)
    columns = best[:, None] * g + torch.arange(g, device=best.device)
    inverse_rows, gram_rows = read_rows(state.inverse, columns), read_rows(state.gram, columns)
    wanted = columns[:, None, :].expand(-1, u.shape[1], -1)
    u_s, v_s = u.gather(2, wanted).mT, v.gather(2, wanted).mT
    inverse_rows -= u_s @ u
    gram_rows -= u_s @ v + v_s @ u
    factor = torch.linalg.cholesky_ex(state.inverse_blocks[entries, best])[0]
    middle = torch.linalg.solve_triangular(factor, state.gram_blocks[entries, best], upper=False)
    curvature = torch.linalg.solve_triangular(factor, middle.mT, upper=False)
    new_u = torch.linalg.solve_triangular(factor, inverse_rows, upper=False)
    new_v = torch.linalg.solve_triangular(factor, gram_rows, upper=False)
    return new_u, new_v - 0.5 * curvature @ new_u


def read_rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """Return the (B, g, n) rows of symmetric matrices of which the lower triangle is stored."""
    batch, n = matrix.shape[:2]
    across = matrix.gather(1, rows[:, :, None].expand(-1, -1, n))
    down = matrix.gather(2, rows[:, None, :].expand(-1, n, -1)).mT
    left = torch.arange(n, device=rows.device) <= rows[:, :, None]
    return torch.where(left, across, down)


def empty_panel(state: State, pivots: int) -> Panel:
    """Return a panel for a compiled implementation to fill."""
    batch, groups = state.alive.shape
    shape = (batch, pivots * state.group_size, groups * state.group_size)
    return Panel(
        torch.empty(batch, pivots, dtype=torch.int64, device=state.inverse.device),
        state.inverse.new_empty(batch, pivots),
        state.inverse.new_empty(shape),
        state.inverse.new_empty(shape),
    )


def addresses(state: State, panel: Panel) -> list[int]:
    """Return the addresses of a panel's arrays, in the order of ``mosaic::Panel``."""
    arrays = (
        state.inverse,
        state.gram,
        state.inverse_blocks,
        state.gram_blocks,
        state.alive,
        panel.u,
        panel.v,
        panel.picked,
        panel.losses,
    )
    return [array.data_ptr() for array in arrays]


def panel_cpp(state: State, pivots: int) -> Panel:
    """Remove ``pivots`` groups with the compiled panel (OpenMP over layers, or over columns)."""
    assert EXTENSION.module is not None
    batch, n = state.inverse.shape[:2]
    threads = torch.get_num_threads()
    if batch == 1:
        threads = min(threads, max(1, n // COLUMNS_PER_THREAD))
    panel = empty_panel(state, pivots)
    EXTENSION.module.prune_panel(
        addresses(state, panel),
        batch,
        n,
        state.group_size,
        pivots,
        state.inverse.element_size(),
        threads,
    )
    return panel


def panel_cuda(state: State, pivots: int) -> Panel:
    """Remove ``pivots`` groups with the compiled kernel, which gives a thread block to each layer.

    Nothing waits for the device. Groups whose two blocks do not fit into shared memory (from 111
    columns of float64 on a small chip to 240 of float32 on a large one) need a workspace of
    about group_size^2 elements a layer.
    """
    assert EXTENSION.module is not None
    batch, n = state.inverse.shape[:2]
    g, device = state.group_size, state.inverse.device
    element_bytes = state.inverse.element_size()
    panel = empty_panel(state, pivots)
    size = EXTENSION.module.prune_workspace_cuda(n, g, element_bytes, device.index)
    workspace = state.inverse.new_empty(batch * size)
    EXTENSION.module.prune_panel_cuda(
        addresses(state, panel),
        workspace.data_ptr(),  # 0 where it is empty
        batch,
        n,
        g,
        pivots,
        element_bytes,
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return panel


PANEL_CPU: RunPanel = panel_torch if EXTENSION.module is None else panel_cpp
PANEL_CUDA: RunPanel = panel_cuda if EXTENSION.has_cuda else panel_torch
