"""Choose the groups of a layer and fit what remains. Mathematics only: tensors in, tensors out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mosaic_kernels import cholesky_inverse, compensate, prune_columns

from .bank import Statistics
from .groups import PrunableLayer


@dataclass(frozen=True)
class LayerProblem:
    """One reader of one stage: its weight (m, n), bias (m,) or None, and how much must go."""

    layer: PrunableLayer
    weight: torch.Tensor
    bias: torch.Tensor | None
    statistics: Statistics
    remove: int


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


def solve_layers(
    problems: Sequence[LayerProblem],
    criterion: str,
    compensation: str,
    damping: float,
    generator: torch.Generator,
) -> list[LayerSolution]:
    """Solve the readers of one stage, those of one shape in one batch.

    Args:
        criterion: `obs`, `magnitude`, `wanda` or `random`.
        compensation: `plain`, `affine` or `none`.
        damping: relative to the mean of the Hessian's diagonal.
        generator: of the `random` criterion.
    """
    batches: dict[tuple, list[int]] = defaultdict(list)
    for index, problem in enumerate(problems):
        batches[(*problem.weight.shape, problem.layer.width)].append(index)
    solutions: dict[int, LayerSolution] = {}
    for members in batches.values():
        chosen = [problems[i] for i in members]
        second_order = [_second_order(problem, compensation) for problem in chosen]
        try:
            orders, dampings = _removal_orders(
                chosen, second_order, criterion, compensation, damping, generator
            )
        except (ValueError, RuntimeError) as error:
            names = ", ".join(f"{k}: {p.layer.reader}" for k, p in enumerate(chosen))
            raise type(error)(f"{error} The entries are {names}.") from None
        for i, hessian, order, used in zip(members, second_order, orders, dampings, strict=True):
            problem = problems[i]
            removed = torch.zeros(problem.layer.groups, dtype=torch.bool)
            removed[order[: problem.remove].cpu()] = True
            kept = (~removed).nonzero().flatten()
            solutions[i] = _fit(problem, kept, hessian, compensation, used)
    return [solutions[i] for i in range(len(problems))]


def _second_order(problem: LayerProblem, compensation: str) -> torch.Tensor:
    """Return H, or C = H - mean mean^T where a bias may take up the mean."""
    statistics = problem.statistics
    if compensation != "affine":
        return statistics.hessian
    return statistics.hessian - torch.outer(statistics.mean, statistics.mean)


def _removal_orders(
    problems: Sequence[LayerProblem],
    second_order: Sequence[torch.Tensor],
    criterion: str,
    compensation: str,
    damping: float,
    generator: torch.Generator,
) -> tuple[list[torch.Tensor], list[float]]:
    """Return for each layer the groups from the first to go, and the damping in use."""
    most = max(problem.remove for problem in problems)
    if criterion == "obs" and most > 0:
        trajectory = prune_columns(
            torch.stack([p.weight.float() for p in problems]),
            torch.stack(list(second_order)),
            group_size=problems[0].layer.width,
            count=most,
            damping=damping,
        )
        return list(trajectory.order), trajectory.damping.tolist()
    orders = [_saliency(problem, criterion, generator).argsort(stable=True) for problem in problems]
    if compensation == "none":
        return orders, [0.0] * len(problems)
    used = cholesky_inverse(torch.stack(list(second_order)), damping=damping)[1]
    return orders, used.tolist()


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


def _fit(
    problem: LayerProblem,
    kept: torch.Tensor,
    second_order: torch.Tensor,
    compensation: str,
    damping: float,
) -> LayerSolution:
    """Fit the kept columns by least squares in float64, and measure what is lost."""
    weight = problem.weight.double()
    hessian = second_order.double()
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
