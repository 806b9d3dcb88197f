"""Say how much each stage and each layer gives up. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..groups import PrunableLayer


def stage_shares(
    give: Sequence[float], steps: Sequence[int], target: float, max_share: float
) -> list[float]:
    """Scale what each stage is willing to give so that the mean over steps meets the target.

    s_i is proportional to give_i; a stage at `max_share` stays there, and what it cannot give
    is redistributed over the others in proportion, until sum_i steps_i s_i / steps = target.

    Args:
        give: not negative, one for each stage (1 - mean score, or 1 for all).
        steps: sampling steps of each stage.
        target: mean share over the steps, in [0, 1).
        max_share: cap, in (0, 1].

    Raises:
        ValueError: the target cannot be met under the cap.
    """
    give_, weight = np.asarray(give, float), np.asarray(steps, float) / sum(steps)
    willing = give_ > 0
    best = float((weight * willing).sum()) * max_share
    if target > best + 1e-12:
        raise ValueError(
            f"allocate: sparsity must be at most {best:.4f} with max_sparsity {max_share}, "
            f"got {target}. Ask for less, or raise max_sparsity."
        )
    capped = np.zeros_like(willing)
    while True:
        free = willing & ~capped
        missing = target - float((weight * capped).sum()) * max_share
        shares = np.where(capped, max_share, 0.0)
        if missing > 0 and free.any():
            shares = shares + free * give_ * (missing / float((weight * give_ * free).sum()))
        over = free & (shares > max_share)
        if not over.any():
            return [float(s) for s in np.minimum(shares, max_share)]
        capped |= over


def score_give(mean_scores: Sequence[float]) -> list[float]:
    """Return 1 - score for stage means of score(t) / max score, clamped to [0, 1].

    Source: MosaicDiff (arXiv 2510.11962), section 3.3: sparsity against learning speed.
    """
    return [1.0 - min(1.0, max(0.0, score)) for score in mean_scores]


def layer_counts(
    layers: Sequence[PrunableLayer],
    shares: Sequence[float],
    ladders: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """Round the share of every layer to whole groups removed, keeping the mean of the stage.

    Heads are coarse, so they are rounded first, by largest remainder in MACs over the stage;
    neurons then make up what the heads' rounding left over.

    Args:
        layers: what may be removed.
        shares: wanted share of each layer, in [0, 1].
        ladders: the numbers of groups that may be removed of each layer, 0 first; any number
            by default. What a layer may not give, the others give in proportion.

    Returns:
        Groups to remove from each layer.
    """
    counts = [0] * len(layers)
    if ladders is None:
        ladders = [range(layer.groups + 1) for layer in layers]
    wanted = _within_limits(
        [s * layer.groups * layer.cost for s, layer in zip(shares, layers, strict=True)],
        [ladder[-1] * layer.cost for ladder, layer in zip(ladders, layers, strict=True)],
    )
    heads = [i for i, layer in enumerate(layers) if layer.kind == "heads"]
    neurons = [i for i, layer in enumerate(layers) if layer.kind != "heads"]
    debt = _round_layers(layers, wanted, heads, ladders, 0.0, counts)
    _round_layers(layers, wanted, neurons, ladders, debt, counts)
    return counts


def _within_limits(wanted: Sequence[float], limits: Sequence[float]) -> list[float]:
    """Cap what is wanted of each layer and spread the rest over those that can give more."""
    given, limit = np.asarray(wanted, float), np.asarray(limits, float)
    total = given.sum()
    for _ in range(len(given)):
        over = given > limit
        if not over.any():
            break
        given = np.minimum(given, limit)
        free = given < limit
        if not given[free].sum() > 0:
            break
        given[free] *= 1 + (total - given.sum()) / given[free].sum()
    return [float(g) for g in np.minimum(given, limit)]


def _round_layers(
    layers: Sequence[PrunableLayer],
    macs: Sequence[float],
    chosen: Sequence[int],
    ladders: Sequence[Sequence[int]],
    debt: float,
    counts: list[int],
) -> float:
    """Round the chosen layers, paying `debt` MACs on top; return the MACs left unpaid."""
    if not chosen:
        return debt
    wanted = {i: macs[i] for i in chosen}
    total = sum(wanted.values())
    # A debt is spread over the layers in proportion to what they give anyway.
    scale = (total + debt) / total if total > 0 else 0.0
    target = total * scale
    steps = {i: ladders[i] for i in chosen}
    exact = {i: min(steps[i][-1], max(0.0, wanted[i] * scale / layers[i].cost)) for i in chosen}
    for i in chosen:
        counts[i] = max(level for level in steps[i] if level <= exact[i] + 1e-9)
    spent = sum(counts[i] * layers[i].cost for i in chosen)
    # Largest remainder first; equal remainders are spread through the depth, not piled up front.
    remainder = {i: exact[i] - counts[i] for i in chosen}
    spread = {i: (k * 0.6180339887498949) % 1.0 for k, i in enumerate(chosen)}
    for i in sorted(chosen, key=lambda i: (-round(remainder[i], 6), spread[i])):
        higher = [level for level in steps[i] if level > counts[i]]
        if not higher or remainder[i] <= 1e-9:
            continue
        step = (higher[0] - counts[i]) * layers[i].cost
        if abs(target - spent - step) < abs(target - spent):
            counts[i] = higher[0]
            spent += step
    return total + debt - spent
