"""Stages from the data: which neighbouring bins of the trajectory share a sub-network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..allocation.items import allowed_levels, make_items, weighted_errors
from ..allocation.optimal import OptimalPath
from ..allocation.planning import Frame
from ..request import Job
from ..statistics.calibration import Calibration
from ..statistics.gather import Progress, fit_to_frame, trace, weights_of
from .stages import Division

#: A further stage must take this share off the predicted error, for each costs storage.
GAIN = 0.1


@dataclass(frozen=True)
class Partition:
    """The best partition of the bins into so many stages, and its predicted error."""

    firsts: tuple[int, ...]
    error: float


def best_partitions(
    bins: int, most: int, cost: Callable[[int, int], float]
) -> list[tuple[tuple[int, ...], float]]:
    """Return the cheapest partition of bins 0..bins-1 into 1, 2, ... `most` runs.

    Dynamic programming: the best with k runs that ends before bin j is the best with k - 1 runs
    that ends before some i < j, and the run i..j-1.

    Args:
        cost: of the run of bins i..j-1, called once for each i < j.

    Returns:
        For each number of runs, the first bin of every run and the sum of the costs.
    """
    runs = {(i, j): cost(i, j) for j in range(1, bins + 1) for i in range(j)}
    best = np.full((most + 1, bins + 1), np.inf)
    last = np.zeros((most + 1, bins + 1), dtype=int)
    best[0, 0] = 0.0
    for k in range(1, most + 1):
        for j in range(k, bins + 1):
            options = [best[k - 1, i] + runs[i, j] for i in range(j)]
            last[k, j] = int(np.argmin(options))
            best[k, j] = options[last[k, j]]
    found = []
    for k in range(1, most + 1):
        firsts, j = [], bins
        for level in range(k, 0, -1):
            j = int(last[level, j])
            firsts.append(j)
        found.append((tuple(reversed(firsts)), float(best[k, bins])))
    return found


def settle_stages(job: Job, given: Calibration, tell: Progress) -> tuple[Frame, Calibration]:
    """Join the bins of a calibration into the stages that the request asks for.

    Raises:
        ValueError: the stages are not made of whole bins.
    """
    frame = job.frame
    bin_steps = given.division.count_steps(frame.visited)
    if job.config.stage_count != "auto" or job.config.boundaries is not None:
        return frame, fit_to_frame(given, frame.division, bin_steps)
    partitions = stages_from_data(job, given, tell)
    chosen = partitions[0]
    for option in partitions[1:]:
        if option.error < (1 - GAIN) * chosen.error:
            chosen = option
    return frame_of(job, given, chosen)


def frame_of(job: Job, given: Calibration, partition: Partition) -> tuple[Frame, Calibration]:
    """Make the stages of a partition of the bins."""
    starts = [given.division.stages[i].last + 1 for i in partition.firsts[1:]]
    frame = job.frame.settle(Division.at_timesteps(job.frame.schedule, starts))
    bin_steps = given.division.count_steps(job.frame.visited)
    return frame, fit_to_frame(given, frame.division, bin_steps)


def stages_from_data(job: Job, given: Calibration, tell: Progress) -> list[Partition]:
    """Return the partitions into 1, 2, ... `max_stages` stages of least predicted error.

    The predicted error of a run of bins is that of `optimal` on the mean of their Hessians, so
    it is exact for one sub-network in all of them. Which level a run takes depends on what the
    others take: it is settled by a price of a saved MAC (the Lagrange multiplier), at which
    every run is as cheap as can be by itself. The price is that of `optimal` on the bins apart.

    Raises:
        ValueError: a bin has no sampling step.
    """
    bins = len(given.division)
    steps = given.division.count_steps(job.frame.visited)
    if not all(steps):
        raise ValueError(
            f"prune: steps must visit each of the {bins} bins of the calibration with stages "
            f"'auto', got {job.config.steps}, which leave {steps.count(0)} without a step. Use "
            "more, state the stages, or calibrate with fewer bins."
        )
    most = min(job.config.max_stages, bins)
    apart = _errors_and_savings(job, given, [(k, k + 1) for k in range(bins)], steps, tell)
    price = _price(job, apart, bins)
    runs = [(i, j) for j in range(1, bins + 1) for i in range(j) if j - i > 1]
    values = dict(apart)
    values.update(_errors_and_savings(job, given, runs, steps, tell))
    ladders = [allowed_levels(layer, job.config) for layer in job.layers]
    found = best_partitions(bins, most, lambda i, j: _least(values[i, j], price, ladders))
    partitions = []
    for firsts, _ in found:
        ends = [*firsts[1:], bins]
        parts = [values[i, j] for i, j in zip(firsts, ends, strict=True)]
        partitions.append(Partition(firsts, _predicted(job, parts)))
    return partitions


#: For each layer, weighted errors and savings at 0..groups removed.
_Run = tuple[list[np.ndarray], list[np.ndarray]]


def _errors_and_savings(
    job: Job,
    given: Calibration,
    runs: list[tuple[int, int]],
    steps: list[int],
    tell: Progress,
) -> dict[tuple[int, int], _Run]:
    values = {}
    for number, (i, j) in enumerate(runs):
        tell("weigh stages", number, len(runs))
        division = Division(
            (replace(given.division.stages[i], first=given.division.stages[j - 1].first),), ()
        )
        alone = replace(given, steps=tuple(steps), curves=None).merged(
            [list(range(i, j))], division
        )
        traced = trace(job, alone, lambda what, done, total: None)
        assert traced.curves is not None
        errors = weighted_errors(job.layers, alone.steps, traced.curves, weights_of(job, traced))
        savings = job.costs.with_steps(alone.steps).savings("sparsity")
        values[i, j] = (errors[0], savings[0])
    return values


def _path(job: Job, parts: list[_Run]) -> OptimalPath:
    config = replace(job.config, choice="separate")
    items = make_items(job.layers, len(parts), [p[0] for p in parts], [p[1] for p in parts], config)
    return OptimalPath(items, len(parts), len(job.layers), config.max_sparsity)


def _target(job: Job) -> float:
    """Return the MACs to save; a budget of another unit is weighed at half of what may go."""
    budget = job.config.budget
    share = budget.value if budget.unit == "sparsity" else 0.5
    return share * job.costs.prunable * sum(job.frame.steps)


def _price(job: Job, apart: dict[tuple[int, int], _Run], bins: int) -> float:
    """Return the error of the last MAC saved when every bin has its own network."""
    path = _path(job, [apart[k, k + 1] for k in range(bins)])
    target = _target(job)
    span = 0.02 * target
    more, less = (path.error(path.levels(target + side * span)) for side in (1, -1))
    return max(0.0, (more - less) / (2 * span)) if span > 0 else 0.0


def _least(run: _Run, price: float, ladders: Sequence[Sequence[int]]) -> float:
    """Return the least error less the price of what is saved, each layer by itself."""
    rows = zip(*run, ladders, strict=True)
    return float(
        sum((error - price * saving)[list(ladder)].min() for error, saving, ladder in rows)
    )


def _predicted(job: Job, parts: list[_Run]) -> float:
    path = _path(job, parts)
    return path.error(path.levels(_target(job)))
