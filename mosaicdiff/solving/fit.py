"""From plans to weights: the compensated layers of a plan, and the staged denoiser they make."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from ..adapters import Adapter
from ..allocation.planning import PrunePlan
from ..config import PruneConfig
from ..groups import Denoiser, PrunableLayer
from ..pack import Parts, StageBuilder, dense_parts, narrow_parts
from ..request import Job
from ..runtime import LayerState, StagedDenoiser, StageInfo
from ..statistics.calibration import Calibration
from ..statistics.gather import problem_of
from .solve import FittedReader, LayerSolution, fit_layer

#: For each stage, the solutions of the layers that give something up, by name.
Solutions = list[dict[str, LayerSolution]]


#: Networks that a search keeps built, at most.
_NETWORKS = 64


class Fitter:
    """Solve the layers of plans, remembering what was solved for plans that come later.

    Args:
        job: the request.
        measured: with curves.
    """

    def __init__(self, job: Job, measured: Calibration) -> None:
        if measured.curves is None:
            raise ValueError("Fitter: measured must have curves, got none. Trace it first.")
        self._job, self._measured, self._curves = job, measured, measured.curves
        self._limit, self._held = 0, 0
        self._memory: OrderedDict[tuple[int, int, int], LayerSolution] = OrderedDict()
        self._networks: OrderedDict[tuple[int, tuple[int, ...]], nn.Module] = OrderedDict()

    def remember(self, limit: int) -> None:
        """Allow so many bytes of solved layers to be kept; the longest unused goes first."""
        self._limit = max(self._limit, limit)

    def solve(
        self, plan: PrunePlan, advance: Callable[[int, int], None] = lambda done, total: None
    ) -> Solutions:
        """Fit what a plan keeps of every layer that gives something up.

        Args:
            advance: hears how many layers are done, of how many.
        """
        total = sum(1 for row in plan.removed for count in row if count)
        done = 0
        solutions: Solutions = []
        for k, row in enumerate(plan.removed):
            solved = {}
            for i, count in enumerate(row):
                if count:
                    solved[self._job.layers[i].name] = self.layer(k, i, count)
                    done += 1
                    advance(done, total)
            solutions.append(solved)
        return solutions

    def layer(self, stage: int, index: int, count: int) -> LayerSolution:
        """Fit one layer of one stage without its first `count` groups to go."""
        key = (stage, index, count)
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        problem = problem_of(self._job, self._measured, stage, index)
        curve = self._curves[stage][problem.layer.name]
        solution = fit_layer(
            problem, curve.kept(count), self._job.config.compensation, curve.damping
        ).to(next(self._job.denoiser.parameters()).device)
        self._memory[key] = solution
        self._held += _bytes(solution)
        while self._held > self._limit and self._memory:
            self._held -= _bytes(self._memory.popitem(last=False)[1])
        return solution

    def network(self, stage: int, row: tuple[int, ...]) -> nn.Module:
        """Build the sub-network of one stage, which shares what it can with the dense one.

        Args:
            row: groups removed of each layer.
        """
        key = (stage, row)
        if key in self._networks:
            self._networks.move_to_end(key)
            return self._networks[key]
        job, builder = self._job, StageBuilder(self._job.denoiser)
        affine = job.config.compensation == "affine"
        for i, count in enumerate(row):
            if count:
                solution, layer = self.layer(stage, i, count), job.layers[i]
                parts = solved_parts(job.denoiser, layer, solution, affine)
                job.adapter.replace(builder, layer, parts, len(solution.kept))
        job.adapter.simplify(builder)
        self._networks[key] = builder.root
        while len(self._networks) > _NETWORKS:
            self._networks.popitem(last=False)
        return builder.root


def solved_parts(
    base: Denoiser, layer: PrunableLayer, solution: LayerSolution, affine: bool
) -> Parts:
    """Collect the tensors of a solved layer: slices of the writers, the reader refitted."""
    parts = narrow_parts(dense_parts(base, layer), layer, solution.kept)
    for reader, fitted in zip(layer.readers, solution.readers, strict=True):
        parts[f"{reader}.weight"] = fitted.weight
        if affine and fitted.bias is not None:
            parts[f"{reader}.bias"] = fitted.bias
    return parts


def _bytes(solution: LayerSolution) -> int:
    return sum(r.weight.numel() * r.weight.element_size() for r in solution.readers)


def last_groups_removed(denoiser: Denoiser, plan: PrunePlan) -> Solutions:
    """Remove the last groups of every layer, with no calibration: the shapes are those of the plan.

    For timing: the weights mean nothing.
    """
    solutions: Solutions = []
    for row in plan.removed:
        solved = {}
        for layer, count in zip(plan.layers, row, strict=True):
            if count:
                kept = torch.arange(layer.groups - count)
                parts = narrow_parts(dense_parts(denoiser, layer), layer, kept)
                readers = tuple(
                    FittedReader(parts[f"{reader}.weight"], parts.get(f"{reader}.bias"))
                    for reader in layer.readers
                )
                solved[layer.name] = LayerSolution(kept, readers, float("nan"), 0.0)
        solutions.append(solved)
    return solutions


def assemble(
    adapter: Adapter, base: Denoiser, plan: PrunePlan, config: PruneConfig, solutions: Solutions
) -> StagedDenoiser:
    """Build the staged denoiser of solved layers around a base, whose other tensors it shares."""
    layers = {layer.name: layer for layer in plan.layers}
    affine, states = config.compensation == "affine", []
    for solved in solutions:
        state = {}
        for name, solution in solved.items():
            parts = solved_parts(base, layers[name], solution, affine)
            state[name] = LayerState(solution.kept, parts)
        states.append(state)
    info = StageInfo(
        base_class=adapter.denoiser_class,
        base_config={k: v for k, v in base.config.items() if not k.startswith("_")},
        division=plan.division,
        layers=plan.layers,
        kept=[{name: s.kept for name, s in solved.items()} for solved in solutions],
        steps=list(plan.steps),
        prune_config=config.to_dict(),
    )
    return StagedDenoiser.assemble(base, info, states)
