"""Choose the groups of a layer and fit what remains. Mathematics only: tensors in, tensors out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mosaic_kernels import cholesky_inverse, compensate, prune_columns, prune_columns_joint

from ..groups import PrunableLayer
from ..statistics.bank import Statistics
from .curves import RemovalCurve, losses_along


@dataclass(frozen=True)
class Reader:
    """One reader in one stage: its weight (m, n), bias (m,) or None, and its statistics."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    statistics: Statistics


@dataclass(frozen=True)
class LayerProblem:
    """One layer of one stage; joint attention has two readers."""

    layer: PrunableLayer
    readers: tuple[Reader, ...]


@dataclass(frozen=True)
class FittedReader:
    """What is kept of a reader.

    Args:
        weight: (m, kept columns), in the reader's dtype.
        bias: (m,), or None where the reader has none and got none.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class LayerSolution:
    """What is kept of a layer.

    Args:
        kept: group indices, sorted, int64.
        readers: refitted.
        error: squared error of the readers' outputs on the calibration set, over their energy.
        damping: that was used, relative to the mean diagonal (0 where none was); the largest of
            the readers'.
    """

    kept: torch.Tensor
    readers: tuple[FittedReader, ...]
    error: float
    damping: float

    def to(self, device: torch.device) -> LayerSolution:
        """Return the same with the readers on a device."""
        readers = tuple(
            FittedReader(r.weight.to(device), None if r.bias is None else r.bias.to(device))
            for r in self.readers
        )
        return replace(self, readers=readers)


def trace_layers(
    problems: Sequence[LayerProblem],
    criterion: str,
    compensation: str,
    damping: float,
    generator: torch.Generator,
) -> list[RemovalCurve]:
    """Order the groups of every layer from the first to go to the last, with what each adds.

    Layers of one shape go through in one batch. Of joint attention both streams lose the same
    heads: those that come first in the two orders fused (`prune_columns_joint`).

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
        shapes = tuple(reader.weight.shape for reader in problem.readers)
        batches[(shapes, problem.layer.width)].append(index)
    curves: dict[int, RemovalCurve] = {}
    for members in batches.values():
        chosen = [problems[i] for i in members]
        try:
            traced = _trace_batch(chosen, criterion, compensation, damping, generator)
        except (ValueError, RuntimeError) as error:
            inputs = [" and ".join(problem.layer.input_names) for problem in chosen]
            names = ", ".join(f"{k}: {name}" for k, name in enumerate(inputs))
            raise type(error)(f"{error} The entries are {names}.") from None
        curves.update(zip(members, traced, strict=True))
    return [curves[i] for i in range(len(problems))]


def trace_along(
    problem: LayerProblem, order: torch.Tensor, compensation: str, damping: Sequence[float]
) -> RemovalCurve:
    """Return what each removal adds along an order that is given, (groups,).

    Args:
        damping: of each reader.
    """
    losses = [
        losses_along(
            reader.weight,
            _second_order(reader, compensation),
            problem.layer.columns(order),
            problem.layer.width,
            damping=share,
            compensated=compensation != "none",
        )
        for reader, share in zip(problem.readers, damping, strict=True)
    ]
    used = [0.0] * len(losses) if compensation == "none" else damping
    return RemovalCurve(order, np.stack(losses), tuple(used))


def _second_order(reader: Reader, compensation: str) -> torch.Tensor:
    """Return H, or C = H - mean mean^T where a bias may take up the mean."""
    statistics = reader.statistics
    if compensation != "affine":
        return statistics.hessian
    return statistics.hessian - torch.outer(statistics.mean, statistics.mean)


def _trace_batch(
    problems: Sequence[LayerProblem],
    criterion: str,
    compensation: str,
    damping: float,
    generator: torch.Generator,
) -> list[RemovalCurve]:
    readers = list(zip(*(problem.readers for problem in problems), strict=True))
    matrices = [
        torch.stack([_second_order(reader, compensation) for reader in row]) for row in readers
    ]
    if criterion == "obs":
        weights = [torch.stack([reader.weight.float() for reader in row]) for row in readers]
        orders, losses, used = _eliminate(weights, matrices, problems[0].layer.width, damping)
        if compensation != "none":
            rows = zip(orders, losses, used.tolist(), strict=True)
            return [RemovalCurve(order, loss, tuple(d)) for order, loss, d in rows]
    else:
        orders = [
            _saliency(problem, criterion, generator).argsort(stable=True).cpu()
            for problem in problems
        ]
        used = torch.zeros(len(problems), len(readers))
        if compensation != "none":  # only for the damping that every matrix needs
            needed = [cholesky_inverse(matrix, damping=damping)[1] for matrix in matrices]
            used = torch.stack(needed, dim=1)
    return [
        trace_along(problem, order, compensation, d)
        for problem, order, d in zip(problems, orders, used.tolist(), strict=True)
    ]


def _eliminate(
    weights: Sequence[torch.Tensor], matrices: Sequence[torch.Tensor], width: int, damping: float
) -> tuple[list[torch.Tensor], np.ndarray, torch.Tensor]:
    """Return orders (B, K) and, for each reader, losses (B, R, K) and damping (B, R)."""
    if len(weights) == 1:
        one = prune_columns(weights[0], matrices[0], group_size=width, damping=damping)
        return list(one.order.cpu()), one.losses[:, None].cpu().numpy(), one.damping[:, None]
    joint = prune_columns_joint(weights, matrices, group_size=width, damping=damping)
    return list(joint.order.cpu()), joint.losses.cpu().numpy(), joint.damping


def _saliency(problem: LayerProblem, criterion: str, generator: torch.Generator) -> torch.Tensor:
    """Return what the baselines think each group is worth, (groups,).

    magnitude: sum |w|. wanda: sum |w| * ||x_j||_2 (arXiv 2306.11695). Summed over the group and,
    in joint attention, over the readers, each over its whole sum.
    """
    groups = problem.layer.groups
    if criterion == "random":
        return torch.rand(groups, generator=generator)
    total = torch.zeros(groups, dtype=torch.float64)
    for reader in problem.readers:
        columns = reader.weight.abs().double().sum(0)
        if criterion == "wanda":
            columns = columns * reader.statistics.hessian.diagonal().double().clamp(min=0).sqrt()
        saliency = columns.reshape(groups, -1).sum(1).cpu()
        total += saliency / saliency.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return total


def fit_layer(
    problem: LayerProblem, kept: torch.Tensor, compensation: str, damping: Sequence[float]
) -> LayerSolution:
    """Fit the kept groups by least squares in float64, and measure what is lost.

    Args:
        kept: sorted group indices.
        compensation: `plain`, `affine` or `none`.
        damping: that the choice was made with, of each reader.
    """
    if len(kept) == problem.layer.groups:
        whole = tuple(FittedReader(reader.weight, reader.bias) for reader in problem.readers)
        return LayerSolution(kept, whole, 0.0, 0.0)
    columns = problem.layer.columns(kept)
    fitted, lost, energy = [], 0.0, 0.0
    for reader, share in zip(problem.readers, damping, strict=True):
        one, error = _fit_reader(reader, columns, compensation, share)
        fitted.append(one)
        lost += error
        energy += _energy(reader.weight.double(), reader.statistics.hessian.double())
    error = lost / energy if energy > 0 else 0.0
    used = 0.0 if compensation == "none" else max(damping)
    return LayerSolution(kept, tuple(fitted), error, used)


def _fit_reader(
    reader: Reader, columns: torch.Tensor, compensation: str, damping: float
) -> tuple[FittedReader, float]:
    """Return the reader on its kept columns, and its squared error."""
    weight = reader.weight.double()
    hessian = _second_order(reader, compensation).double()
    columns = columns.to(weight.device)
    if compensation == "none":
        fitted = weight[:, columns]
    else:
        fitted = compensate(weight, hessian, columns, damping=damping)
    change = weight.clone()
    change[:, columns] -= fitted
    bias = reader.bias
    if compensation == "affine":
        shift = change @ reader.statistics.mean.double()
        base = torch.zeros_like(shift) if bias is None else bias.double()
        bias = (base + shift).to(reader.weight.dtype)
    kept = FittedReader(fitted.to(reader.weight.dtype).contiguous(), bias)
    return kept, _energy(change, hessian)


def _energy(weight: torch.Tensor, second_order: torch.Tensor) -> float:
    """Return trace(W H W^T) = E ||W x||^2."""
    return float(((weight @ second_order) * weight).sum())
