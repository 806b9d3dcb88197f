"""Plans from curves: every allocation at any effort, and the one that meets a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..config import PruneConfig
from ..solving.curves import RemovalCurve
from .budget import Budget, meet
from .costs import CostModel, describe_cost
from .items import Errors, make_items, weighted_errors
from .optimal import OptimalPath
from .planning import Frame, PrunePlan, most_sparsity, share_plan

#: What shares know nothing of.
_BY_SHARE: Any = {"granularity": "structured", "choice": "separate"}
#: The plan at an effort in [0, 1].
PlanAt = Callable[[float], PrunePlan]


class Allocator:
    """Make plans within a frame, from the curves of every layer of every stage.

    Args:
        frame: the stages.
        config: the request.
        costs: what plans cost; with latencies where the budget is one.
        curves: for each stage, by layer name.
        weights: of the layers' errors, for each stage, by layer name; None counts all alike.
        drops: for each stage, by layer or block name, what dropping it changes; None where the
            curves say so.
    """

    def __init__(
        self,
        frame: Frame,
        config: PruneConfig,
        costs: CostModel,
        curves: Sequence[Mapping[str, RemovalCurve]],
        weights: Sequence[Mapping[str, float]] | None = None,
        drops: Sequence[Mapping[str, float]] | None = None,
    ) -> None:
        self.frame, self.config, self.costs, self.curves = frame, config, costs, curves
        self.layers = costs.layers
        self.errors: Errors = weighted_errors(self.layers, frame.steps, curves, weights)
        self._drops = drops
        self._paths: dict[str, OptimalPath] = {}

    def path(self, unit: str) -> OptimalPath:
        """Return the steps of `optimal` for costs in a unit, worked out once."""
        if unit not in self._paths:
            drops = self._drops
            if drops is not None:
                drops = [
                    {name: count * value for name, value in row.items()}
                    for count, row in zip(self.frame.steps, drops, strict=True)
                ]
            items = make_items(
                self.layers, len(self.frame.steps), self.errors, self.costs.savings(unit),
                self.config, drops,
            )  # fmt: skip
            self._paths[unit] = OptimalPath(
                items, len(self.frame.steps), len(self.layers), self.config.max_sparsity
            )
        return self._paths[unit]

    def plan_of(self, removed: Sequence[Sequence[int]]) -> PrunePlan:
        """Wrap numbers of groups removed as a plan."""
        frozen = tuple(tuple(row) for row in removed)
        plan = PrunePlan(self.frame.division, self.frame.steps, (), self.layers, frozen)
        shares = tuple(plan.stage_sparsity(k) for k in range(len(self.frame.steps)))
        return PrunePlan(self.frame.division, self.frame.steps, shares, self.layers, frozen)

    def plans(self, unit: str, allocation: str | None = None) -> PlanAt:
        """Return the plans of an allocation by effort, for costs in a unit."""
        allocation = self.config.allocation if allocation is None else allocation
        if allocation in ("score", "uniform"):
            config = replace(self.config, allocation=allocation, **_BY_SHARE)
            most = most_sparsity(self.layers, self.frame, config)
            return lambda effort: share_plan(self.layers, self.frame, config, effort * most)
        path = self.path("sparsity" if unit == "quality" else unit)
        return lambda effort: self.plan_of(path.at(effort))

    def cost(self, unit: str, plan: PrunePlan) -> float:
        """Return what a plan costs in a unit, as it will be measured."""
        kept = None
        if unit in ("params", "size"):
            kept = self.kept(plan)
        return self.costs.cost(unit, plan.removed, kept)

    def kept(self, plan: PrunePlan) -> list[list[torch.Tensor]]:
        """Return the groups that a plan keeps of each layer of each stage."""
        return [
            [
                self.curves[k][layer.name].kept(count)
                for layer, count in zip(self.layers, row, strict=True)
            ]
            for k, row in enumerate(plan.removed)
        ]

    def error(self, plan: PrunePlan) -> float:
        """Return the plan's predicted error: the layers' weighted errors, summed over the steps.

        Weighted by `trajectory` it is an estimate of `trajectory.probe.latent_error`, of the final
        latents, as if the errors of layers and stages had nothing to do with each other. On
        `digits` it came out three to nine times too low (benchmarks.bench_allocation).
        """
        return sum(
            float(self.errors[k][i][count])
            for k, row in enumerate(plan.removed)
            for i, count in enumerate(row)
        )

    def meet(self, budget: Budget, allocation: str | None = None) -> PrunePlan:
        """Return the plan that meets a budget, of any unit but quality.

        Raises:
            ValueError: it cannot be met within 2%; the message says what can be had.
        """
        unit = budget.unit
        allocation = self.config.allocation if allocation is None else allocation
        if allocation == "explicit":
            return share_plan(self.layers, self.frame, self.config, 0.0)
        if unit == "sparsity" and allocation in ("score", "uniform"):
            # The shares meet it by themselves; rounding is theirs to even out.
            config = replace(self.config, allocation=allocation, **_BY_SHARE)
            return share_plan(self.layers, self.frame, config, budget.value)
        return meet(
            budget,
            self.costs.dense(unit),
            self.plans(unit, allocation),
            lambda plan: self.cost(unit, plan),
            lambda cost: describe_cost(unit, cost),
        )
