"""Choose the groups of a layer and fit what remains. Mathematics only: tensors in, tensors out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mosaic_kernels import cholesky_inverse, compensate, prune_columns

from ..groups import PrunableLayer
from ..statistics.bank import Statistics
from .curves import RemovalCurve, losses_along


@dataclass(frozen=True)
class LayerProblem:
    """One reader of one stage: its weight (m, n), bias (m,) or None, and its statistics."""

    layer: PrunableLayer
    weight: torch.Tensor
    bias: torch.Tensor | None
    statistics: Statistics


@dataclass(frozen=True)
class LayerSolution:
    """What is kept of a reader.

    Args:
        kept: group indices, sorted, int64.
        weight: (m, len(kept) * width), in the reader's dtype.
        bias: (m,), or None where the reader has none and got none.
        error: squared error of the layer's output on the calibration set, over its energy.
        damping: that was used, relative to the mean diagonal (0 where none was).
    """

    kept: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    error: float
    damping: float


def trace_layers(
    problems: Sequence[LayerProblem],
    criterion: str,
    compensation: str,
    damping: float,
    generator: torch.Generator,
) -> list[RemovalCurve]:
    """Order the groups of every layer from the first to go to the last, with what each adds.

    Layers of one shape go through in one batch.

    Args:
        criterion: `obs`, `magnitude`, `wanda` or `random`.
        compensation: `plain`, `affine` or `none`: the losses are those of the refitted layer.
        damping: relative to the mean of the Hessian's diagonal.
        generator: of the `random` criterion.

    Raises:
        ValueError, RuntimeError: a Hessian cannot be used; the message names the readers.
    """
    batches: dict[tuple, list[int]] = defaultdict(list)
    for index, problem in enumerate(problems):
        batches[(*problem.weight.shape, problem.layer.width)].append(index)
    curves: dict[int, RemovalCurve] = {}
    for members in batches.values():
        chosen = [problems[i] for i in members]
        second_order = [_second_order(problem, compensation) for problem in chosen]
        try:
            traced = _trace_batch(chosen, second_order, criterion, compensation, damping, generator)
        except (ValueError, RuntimeError) as error:
            names = ", ".join(f"{k}: {p.layer.reader}" for k, p in enumerate(chosen))
            raise type(error)(f"{error} The entries are {names}.") from None
        curves.update(zip(members, traced, strict=True))
    return [curves[i] for i in range(len(problems))]


def trace_along(
    problem: LayerProblem, order: torch.Tensor, compensation: str, damping: float
) -> RemovalCurve:
    """Return what each removal adds along an order that is given, (groups,)."""
    losses = losses_along(
        problem.weight,
        _second_order(problem, compensation),
        problem.layer.columns(order),
        problem.layer.width,
        damping=damping,
        compensated=compensation != "none",
    )
    return RemovalCurve(order, losses, 0.0 if compensation == "none" else damping)


def _second_order(problem: LayerProblem, compensation: str) -> torch.Tensor:
    """Return H, or C = H - mean mean^T where a bias may take up the mean."""
    statistics = problem.statistics
    if compensation != "affine":
        return statistics.hessian
    return statistics.hessian - torch.outer(statistics.mean, statistics.mean)


def _trace_batch(
    problems: Sequence[LayerProblem],
    second_order: Sequence[torch.Tensor],
    criterion: str,
    compensation: str,
    damping: float,
    generator: torch.Generator,
) -> list[RemovalCurve]:
    if criterion == "obs":
        trajectory = prune_columns(
            torch.stack([p.weight.float() for p in problems]),
            torch.stack(list(second_order)),
            group_size=problems[0].layer.width,
            damping=damping,
        )
        orders = list(trajectory.order.cpu())
        if compensation != "none":
            losses = trajectory.losses.cpu().numpy()
            return [
                RemovalCurve(order, loss, used)
                for order, loss, used in zip(
                    orders, losses, trajectory.damping.tolist(), strict=True
                )
            ]
    else:
        orders = [
            _saliency(problem, criterion, generator).argsort(stable=True).cpu()
            for problem in problems
        ]
    used = [0.0] * len(problems)
    if compensation != "none":  # only for the damping that every matrix needs
        used = cholesky_inverse(torch.stack(list(second_order)), damping=damping)[1].tolist()
    return [
        trace_along(problem, order, compensation, d)
        for problem, order, d in zip(problems, orders, used, strict=True)
    ]


def _saliency(problem: LayerProblem, criterion: str, generator: torch.Generator) -> torch.Tensor:
    """Return what the baselines think each group is worth, (groups,).

    magnitude: sum |w|. wanda: sum |w| * ||x_j||_2 (arXiv 2306.11695), summed over the group.
    """
    groups = problem.layer.groups
    if criterion == "random":
        return torch.rand(groups, generator=generator)
    columns = problem.weight.abs().double().sum(0)
    if criterion == "wanda":
        columns = columns * problem.statistics.hessian.diagonal().double().clamp(min=0).sqrt()
    return columns.reshape(groups, -1).sum(1)


def fit_layer(
    problem: LayerProblem, kept: torch.Tensor, compensation: str, damping: float
) -> LayerSolution:
    """Fit the kept groups by least squares in float64, and measure what is lost.

    Args:
        kept: sorted group indices.
        compensation: `plain`, `affine` or `none`.
        damping: that the choice was made with.
    """
    weight = problem.weight.double()
    hessian = _second_order(problem, compensation).double()
    columns = problem.layer.columns(kept).to(weight.device)
    if len(kept) == problem.layer.groups:
        return LayerSolution(kept, problem.weight, problem.bias, 0.0, 0.0)
    if compensation == "none":
        fitted, used = weight[:, columns], 0.0
    else:
        fitted, used = compensate(weight, hessian, columns, damping=damping), damping
    change = weight.clone()
    change[:, columns] -= fitted
    bias = problem.bias
    if compensation == "affine":
        shift = change @ problem.statistics.mean.double()
        base = torch.zeros_like(shift) if bias is None else bias.double()
        bias = (base + shift).to(problem.weight.dtype)
    energy = _energy(weight, problem.statistics.hessian.double())
    lost = _energy(change, hessian)
    error = lost / energy if energy > 0 else 0.0
    return LayerSolution(kept, fitted.to(problem.weight.dtype).contiguous(), bias, error, used)


def _energy(weight: torch.Tensor, second_order: torch.Tensor) -> float:
    """Return trace(W H W^T) = E ||W x||^2."""
    return float(((weight @ second_order) * weight).sum())
