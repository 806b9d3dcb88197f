"""Greedy elimination of groups of columns that several layers read and lose together."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mosaic_kernels import _checks, _damping, _elimination, _memory, _products
from mosaic_kernels._extension import EXTENSION
from mosaic_kernels._precision import full_precision
from mosaic_kernels._trajectory import Removals
from mosaic_kernels.cholesky import inverse_of_entries
from mosaic_kernels.prune import check_losses

# A group of rank r counts 1 / (FUSION + r + 1); rank 0 is the least loss.
FUSION = 60
# Sums of such fractions that are equal may differ by a few roundings, depending on their order;
# of two readers with 100 groups, sums that are not equal differ by 1e-8 of themselves.
TIE = 1e-14


class JointTrajectory(Removals):
    """The order in which R readers, or a batch of such sets, lose their groups.

    Its first k entries are the pruning at level k, the same columns for every reader.

    Args:
        order: (B, K) int64, group indices in order of removal.
        losses: (B, R, K) float64, what each removal adds to each reader's squared error
            ||(W - W') L||_F^2 under its damped H = L L^T; the cumulative sums are the errors.
        damping: (B, R) float64 on the CPU, the damping that was used for each reader.
        group_size: columns in a group.
        columns: input columns of each reader, before pruning.
    """


def prune_columns_joint(
    weights: Sequence[Tensor],
    hs: Sequence[Tensor],
    *,
    group_size: int,
    count: int | None = None,
    damping: float = 0.01,
    max_bytes: int | None = None,
) -> JointTrajectory:
    """Remove groups of input columns one by one, the same ones from every reader.

    The two output projections of joint attention, of the image's stream and of the context's,
    share their heads: a head leaves both or none. With the losses of ``prune_columns`` for each
    reader r, the groups that are left are ranked (rank 0 = least loss, ties by index) and the
    ranks fused: the group of the highest sum_r 1 / (60 + rank_r + 1) goes; ties to the least sum
    of losses, each reader's divided by their sum over the groups that are left, then to the
    lowest index. A single reader loses its groups in the order of ``prune_columns``. Columns that
    never fired for a reader (H_jj = 0) count as zero weights there. The operations are those of
    ``prune_columns`` for each reader: 3/2 (n^3 - r^3) / 3 multiply-adds from n to r columns after
    the inverse and W^T W, and at each removal a Cholesky solve of (group_size, group_size) for
    every group left. Works in the type of ``hs``; the inputs are not modified. The sets of a
    batch are worked on together as far as memory allows.

    Args:
        weights: R tensors (B, m_r, n) or (m_r, n), any floating type; m_r may differ.
        hs: R tensors (B, n, n) or (n, n), all float32 or all float64, symmetric, as
            ``hessian_finalize_`` left them.
        group_size: columns in a group: the head's width for heads.
        count: number of groups to remove; all of them by default.
        damping: share of mean(diag H) that is added to the diagonal, see ``cholesky_inverse``.
        max_bytes: memory to use beside the inputs; what is free by default.

    Returns:
        The trajectory of the removals.

    Raises:
        ValueError: an argument is not as described, not finite, or an H is all zero, or one set
            of readers alone does not fit into ``max_bytes``.
        RuntimeError: one set of readers alone does not fit into the free memory; an H has no
            Cholesky factor at any damping; or an inverse stopped being positive definite for lack
            of precision.

    Source: OBS-Diff (arXiv 2510.06751) for MMDiT; reciprocal rank fusion, Cormack et al. 2009;
    the blocked form is ours, see ``_elimination``.
    """
    name = "prune_columns_joint"
    _require_readers(name, weights, hs)
    _checks.require_damping(name, damping)
    n = hs[0].shape[-1]
    count = _checks.require_removals(name, n, group_size, count)
    batch_ws = [(w if w.dim() == 3 else w.unsqueeze(0)).detach() for w in weights]
    batch_hs = [(h if h.dim() == 3 else h.unsqueeze(0)).detach() for h in hs]
    for r, h in enumerate(batch_hs):
        _damping.require_usable(name, h, label=f"hs[{r}]")
    batch, readers, like = batch_hs[0].shape[0], len(batch_hs), batch_hs[0]
    rows = max(w.shape[1] for w in batch_ws)
    needed = joint_bytes(rows, n, group_size, readers, like.element_size(), like.device)
    step = _memory.layers_at_once(name, batch, needed, like.device, max_bytes)
    order = torch.empty(batch, count, dtype=torch.int64, device=like.device)
    losses = torch.empty(batch, readers, count, dtype=torch.float64, device=like.device)
    used = torch.empty(batch, readers, dtype=torch.float64)
    run_panel = partial(_elimination.panel_torch, choose=partial(choose_fused, readers=readers))
    for begin in range(0, batch, step):
        part = slice(begin, begin + step)
        shape = (min(step, batch - begin), readers, n, n)
        inverse = like.new_empty(shape)
        for r, h in enumerate(batch_hs):
            inverse[:, r], used[part, r] = inverse_of_entries(
                h[part], damping, first=begin, label=f"hs[{r}]"
            )
        if count == 0:
            continue
        with full_precision():
            gram = _gram([w[part] for w in batch_ws], [h[part] for h in batch_hs])
            state = _elimination.state_of(inverse.flatten(0, 1), gram.flatten(0, 1), group_size)
            del inverse, gram
            picked, added = _elimination.eliminate_from(state, count, run_panel)
        order[part] = picked.view(-1, readers, count)[:, 0]
        losses[part] = added.view(-1, readers, count).double()
    for r in range(readers):
        check_losses(name, losses[:, r], like.dtype, f"the inverse of hs[{r}]")
    return JointTrajectory(order, losses, used, group_size, n)


def _require_readers(name: str, weights: Sequence[Tensor], hs: Sequence[Tensor]) -> None:
    """Check R weights and R Hs: each a layer, all of the same columns, batch, type and device."""
    for label, given in (("weights", weights), ("hs", hs)):
        _checks.require(
            isinstance(given, Sequence) and len(given) > 0,
            name,
            label,
            "a sequence of tensors, one for each reader and at least one",
            "none" if isinstance(given, Sequence) else type(given).__name__,
            "Pass [to_out, to_add_out], or a list of one.",
        )
    _checks.require(
        len(weights) == len(hs),
        name,
        "weights",
        f"as many as hs ({len(hs)})",
        len(weights),
        "Each reader has its own H, even where they share the input.",
    )
    for r, (weight, h) in enumerate(zip(weights, hs, strict=True)):
        _checks.require_layer(name, weight, h, (2, 3), index=f"[{r}]")
        first = hs[0]
        _checks.require(
            (h.shape, h.dtype, h.device) == (first.shape, first.dtype, first.device),
            name,
            f"hs[{r}]",
            f"like hs[0], {_checks.describe(first)}",
            _checks.describe(h),
            "Readers that lose columns together read the same columns.",
        )


def joint_bytes(
    rows: int,
    columns: int,
    group_size: int,
    readers: int,
    element_size: int,
    device: torch.device,
) -> int:
    """Return the memory that ``prune_columns_joint`` needs for one set beside its inputs.

    Each reader's A and G, and panels; where these are not packed in place, that is without the
    compiled module or on CUDA, packing copies one of the two twice. Of ``rows``, those of the
    tallest weight, one copy in the type of H and one with its dead columns cleared.
    """
    in_place = device.type == "cpu" and EXTENSION.module is not None
    matrices = 2 if in_place else 4
    # U and V, the diagonal blocks of A and G, and temporaries of a pivot and of the losses
    panel = 16 * max(_elimination.PANEL_COLUMNS, group_size)
    return element_size * columns * (readers * (matrices * columns + panel) + 2 * rows)


def _gram(weights: list[Tensor], hs: list[Tensor]) -> Tensor:
    """Return (B, R, n, n), W^T W of each reader without its dead columns; lower triangles."""
    batch, n = hs[0].shape[:2]
    gram = hs[0].new_zeros(batch, len(hs), n, n)
    for r, (weight, h) in enumerate(zip(weights, hs, strict=True)):
        dead = h.diagonal(dim1=-2, dim2=-1) == 0
        work = weight.to(h.dtype).masked_fill(dead[:, None, :], 0)
        _products.add_product_lower_(gram[:, r], (work, work))
    return gram


def choose_fused(losses: Tensor, readers: int) -> Tensor:
    """Choose one group for all readers of a set by reciprocal rank fusion.

    Args:
        losses: (B * readers, groups), a set's readers in a row; infinite for groups that are
            gone, the same ones for every reader.
        readers: R.

    Returns:
        (B * readers,) int64, the same position for every reader of a set.

    Source: Cormack, Clarke & Buettcher, SIGIR 2009.
    """
    each = losses.double().unflatten(0, (-1, readers))
    # Groups that are gone rank behind all others for every reader: theirs are the least scores.
    ranks = each.argsort(dim=-1, stable=True).argsort(dim=-1)
    score = (1 / (FUSION + 1 + ranks).double()).sum(1)
    tied = score >= score.amax(-1, keepdim=True) * (1 - TIE)
    left = each.masked_fill(torch.isinf(each), 0)
    total = left.sum(-1, keepdim=True)
    share = torch.where(total > 0, left / total, 0).sum(1)
    best = share.masked_fill(~tied, float("inf")).argmin(-1)
    return best.repeat_interleave(readers)
