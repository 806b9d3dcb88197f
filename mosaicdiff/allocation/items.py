"""The decisions of an optimal allocation, from error curves and costs. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..config import PruneConfig
from ..groups import PrunableLayer
from ..patterns import is_chosen
from ..solving.curves import RemovalCurve
from .optimal import Item

#: For each stage, of each layer: the squared error at 0..groups removed.
Errors = Sequence[Sequence[np.ndarray]]


def allowed_levels(layer: PrunableLayer, config: PruneConfig) -> list[int]:
    """List the numbers of groups of a layer that may be removed, 0 first.

    Kept neurons are a multiple of `round_to`, or all of them, and not fewer than the least. With
    `auto` kept groups of either kind are a multiple of the layer's own unit.

    Raises:
        ValueError: the least, or the multiple, is more than the layer has.
    """
    heads = layer.kind == "heads"
    least = config.least_heads if heads else config.least_neurons
    if least > layer.groups:
        raise ValueError(
            f"prune: least_{layer.kind} must be at most {layer.groups}, the {layer.kind} of "
            f"{layer.name}, got {least}."
        )
    auto = config.round_to == "auto"
    multiple = layer.unit if auto else 1 if heads else int(config.round_to)
    if multiple > layer.groups:
        raise ValueError(
            f"prune: round_to must be at most {layer.groups}, the neurons of {layer.name}, got "
            f"{config.round_to}. Take a divisor of that, e.g. 64."
        )
    if is_kept_whole(layer, config):
        return [0]
    if config.granularity != "structured":
        return [0] if least > 0 else [0, layer.groups]
    kept = {layer.groups, *(n for n in range(0, layer.groups + 1, multiple) if n >= least)}
    return sorted(layer.groups - n for n in kept)


def is_kept_whole(layer: PrunableLayer, config: PruneConfig) -> bool:
    """Tell whether a layer is excluded, or not among those that are included."""
    return not is_chosen(layer.name, config.include, config.exclude)


def weighted_errors(
    layers: Sequence[PrunableLayer],
    steps: Sequence[int],
    curves: Sequence[Mapping[str, RemovalCurve]],
    weights: Sequence[Mapping[str, float]] | None,
) -> list[list[np.ndarray]]:
    """Return every error curve times the stage's steps and the weights of the layer's readers."""
    rows = []
    for k, count in enumerate(steps):
        row = []
        for layer in layers:
            weight = None if weights is None else [weights[k][name] for name in layer.input_names]
            row.append(count * curves[k][layer.name].errors(weight))
        rows.append(row)
    return rows


def make_items(
    layers: Sequence[PrunableLayer],
    stages: int,
    errors: Errors,
    savings: Sequence[Sequence[np.ndarray]],
    config: PruneConfig,
    drops: Sequence[Mapping[str, float]] | None = None,
) -> list[Item]:
    """Make the decisions: one a layer and stage, or fewer where some are tied together.

    With `choice="shared"` all stages of a layer share a level; with `granularity="blocks"` the
    attention and the FFN of a block go together.

    Args:
        errors: weighted, see `weighted_errors`.
        savings: of 0..groups removed, for each stage and layer.
        drops: for each stage, by layer or block name, what dropping it changes; takes the place
            of the curve's end for whole layers and blocks.
    """
    prunable = sum(layer.groups * layer.cost for layer in layers)
    groups: list[list[int]] = [[i] for i in range(len(layers))]
    if config.granularity == "blocks":
        blocks: dict[str, list[int]] = {}
        for i, layer in enumerate(layers):
            blocks.setdefault(layer.block, []).append(i)
        groups = list(blocks.values())
    stage_sets = (
        [tuple(range(stages))]
        if config.choice == "shared"
        else [(stage,) for stage in range(stages)]
    )
    items = []
    for members in groups:
        ladders = [allowed_levels(layers[i], config) for i in members]
        if len(members) > 1:  # together or not at all
            whole = all(len(ladder) > 1 for ladder in ladders)
            ladders = [[0, layers[i].groups] if whole else [0] for i in members]
        if len(ladders[0]) == 1:
            continue
        for stage_set in stage_sets:
            items.append(
                _make_item(layers, members, ladders, stage_set, errors, savings, prunable, drops)
            )
    return items


def _make_item(
    layers: Sequence[PrunableLayer],
    members: Sequence[int],
    ladders: Sequence[Sequence[int]],
    stage_set: Sequence[int],
    errors: Errors,
    savings: Sequence[Sequence[np.ndarray]],
    prunable: int,
    drops: Sequence[Mapping[str, float]] | None,
) -> Item:
    levels = len(ladders[0])
    error, saving = np.zeros(levels), np.zeros(levels)
    shares = {stage: np.zeros(levels) for stage in stage_set}
    for stage in stage_set:
        for i, ladder in zip(members, ladders, strict=True):
            index = np.asarray(ladder)
            error += errors[stage][i][index]
            saving += savings[stage][i][index]
            shares[stage] += index * layers[i].cost / prunable
    if drops is not None:
        layer = layers[members[0]]
        name = layer.block if len(members) > 1 else layer.name
        error[-1] = sum(drops[stage][name] for stage in stage_set)
    pairs = tuple((stage, i) for stage in stage_set for i in members)
    removed = np.stack([np.asarray(ladder) for _ in stage_set for ladder in ladders], axis=1)
    return Item(pairs, removed, error - error[0], np.maximum.accumulate(saving), shares)
