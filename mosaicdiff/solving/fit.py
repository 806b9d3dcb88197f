"""From plans to weights: the compensated layers of a plan, and the staged denoiser they make."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from ..adapters import Adapter
from ..allocation.planning import PrunePlan
from ..config import PruneConfig
from ..groups import Denoiser, PrunableLayer, leading_parameter
from ..pack import LayerState, Parts, dense_parts, narrow_parts
from ..request import Job
from ..runtime import StagedDenoiser
from ..stage_state import StageInfo
from ..statistics.calibration import Calibration
from ..statistics.gather import problem_of
from ..surgery import Surgeon
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
        ).to(leading_parameter(self._job.denoiser).device)
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
        job, states = self._job, {}
        affine = job.config.compensation == "affine"
        for i, count in enumerate(row):
            if count:
                solution, layer = self.layer(stage, i, count), job.layers[i]
                parts = solved_parts(job.denoiser, layer, solution, affine)
                states[layer.name] = LayerState(solution.kept, parts)
        surgeon = Surgeon(job.adapter, job.layers)
        self._networks[key] = built = surgeon.build(job.denoiser, states).root
        while len(self._networks) > _NETWORKS:
            self._networks.popitem(last=False)
        return built


def solved_parts(
    base: Denoiser, layer: PrunableLayer, solution: LayerSolution, affine: bool
) -> Parts:
    """Collect the tensors of a solved layer: slices of the writers, the reader refitted."""
    parts = narrow_parts(dense_parts(base, layer), layer, solution.kept)
    for reader, (weight, bias) in zip(solution.readers, _reader_pieces(layer), strict=True):
        # A convolution's weight is a matrix to the solver.
        parts[weight] = reader.weight.reshape(parts[weight].shape)
        if affine and reader.bias is not None:
            parts[bias] = reader.bias
    return parts


def _reader_pieces(layer: PrunableLayer) -> list[tuple[str, str]]:
    """Return the names of the pieces of every reader: its weight's, and its bias's."""
    weights = [piece.name for piece in layer.pieces if piece.axis == 1]
    return [(w, f"{r.module}.bias") for w, r in zip(weights, layer.readers, strict=True)]


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
                    FittedReader(parts[weight], parts.get(bias))
                    for weight, bias in _reader_pieces(layer)
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
