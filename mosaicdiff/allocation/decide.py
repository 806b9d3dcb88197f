"""Choose the plan that a request asks for: by count, by measurement, or by search."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..request import Job
from ..search.fitness import search_plan
from ..solving.fit import Fitter
from ..statistics.calibration import Calibration
from ..statistics.gather import Progress, make_probe, trace, weights_of
from ..trajectory.probe import Probe
from ..trajectory.segment import settle_stages
from .allocator import Allocator
from .budget import TOLERANCE, Budget
from .latency_budget import decide_by_latency
from .planning import PrunePlan

#: Prunings that a quality budget may measure.
_MEASUREMENTS = 14


def make_allocator(job: Job, given: Calibration, tell: Progress) -> tuple[Allocator, Fitter]:
    """Settle the stages, trace the curves, and set up what makes plans and what fits them."""
    frame, stages = settle_stages(job, given, tell)
    stages = trace(job, stages, tell)
    ranks = None
    if job.config.granularity != "structured" and job.config.depth_rank != "curve":
        ranks = [row[job.config.depth_rank] for row in _required(stages.changes, "depth_rank")]
    weights = weights_of(job, stages)
    assert stages.curves is not None
    costs = job.costs.with_steps(frame.steps)
    allocator = Allocator(frame, job.config, costs, stages.curves, weights, ranks)
    return allocator, Fitter(job, stages)


def _required(values: Any, option: str) -> Any:
    if values is None:
        raise ValueError(
            f"calibration: {option} needs a measurement that this calibration lacks. "
            f"Calibrate again with that option."
        )
    return values


@dataclass(frozen=True)
class Decision:
    """A plan, and how it came about.

    Args:
        plan: what goes.
        budget: that was asked for.
        reached: in the budget's unit; None where shares were stated.
        predicted_error: see `Allocator.error`.
        measured: what was measured on the way.
    """

    plan: PrunePlan
    budget: Budget
    reached: float | None
    predicted_error: float
    measured: dict[str, Any] = field(default_factory=dict)


def decide(
    job: Job,
    allocator: Allocator,
    fitter: Fitter,
    tell: Progress,
    search_state: Path | None = None,
) -> Decision:
    """Return the plan that meets the request's budget by its allocation.

    Raises:
        ValueError: the budget cannot be met; the message says what can be had.
    """
    config, budget = job.config, job.config.budget
    if config.allocation == "explicit":
        made = allocator.meet(budget)
        return Decision(made, Budget("sparsity", made.sparsity), None, allocator.error(made))
    if config.allocation == "evolutionary":
        made, history = search_plan(
            job, allocator, fitter, make_probe(job, "a search"), tell, search_state
        )
        reached = allocator.cost(budget.unit, made)
        return Decision(made, budget, reached, allocator.error(made), {"search": history})
    if budget.unit == "quality":
        return _decide_by_quality(job, allocator, fitter, tell)
    if budget.unit == "latency":
        made, reached, measured = decide_by_latency(job, allocator, tell)
        return Decision(made, budget, reached, allocator.error(made), measured)
    made = allocator.meet(budget)
    return Decision(made, budget, allocator.cost(budget.unit, made), allocator.error(made))


def measured_error(probe: Probe, fitter: Fitter, plan: PrunePlan) -> float:
    """Prune as planned, sample, and return the error of the final latents."""
    networks = [fitter.network(k, row) for k, row in enumerate(plan.removed)]
    return probe.error(probe.run(networks, plan.steps))


def _decide_by_quality(job: Job, allocator: Allocator, fitter: Fitter, tell: Progress) -> Decision:
    """Find the largest effort whose measured error stays under the bound.

    Predicted errors are in units of the layers. Measured ones follow them nearly by a power law,
    so each guess is read off the predicted curve by the last measurement; where two of those
    do not halve what is left, the next is its middle.
    """
    bound, budget = job.config.budget.value, job.config.budget
    probe = make_probe(job, "a quality budget")
    plans = allocator.plans("quality")
    rows: list[dict[str, float]] = []
    known: dict[tuple[tuple[int, ...], ...], float] = {}
    spans: list[float] = []
    low, high, found = 0.0, 1.0, None
    effort, reached = 0.3, 0.0
    for number in range(_MEASUREMENTS):
        tell("measure errors", number, _MEASUREMENTS)
        plan = plans(effort)
        if plan.removed not in known:  # few groups: several efforts may mean one plan
            known[plan.removed] = measured_error(probe, fitter, plan)
            row = {"effort": effort, "sparsity": plan.sparsity, "error": known[plan.removed]}
            rows.append(row)
        error = known[plan.removed]
        if not math.isfinite(error):
            error = math.inf
        if error <= bound:
            low, found, reached = effort, plan, error
            if error >= (1 - TOLERANCE) * bound or effort == 1.0:
                break
        else:
            high = effort
        spans.append(high - low)
        if len(spans) > 2 and spans[-1] > spans[-3] / 2:  # errors that jump: no law to go by
            guess = (low + high) / 2
        else:
            guess = _next_effort(allocator, plans, plan, error, bound, low, high)
        if abs(guess - effort) < 1e-5:
            break
        effort = guess
    tell("measure errors", _MEASUREMENTS, _MEASUREMENTS)
    if found is None or found.sparsity == 0:
        least = min((r for r in rows if r["sparsity"] > 0), key=lambda row: row["sparsity"])
        raise ValueError(
            f"budget: quality {bound:g} must be more than what the least removal costs: at a "
            f"sparsity of {least['sparsity']:.2%} the error is {least['error']:.3g}. Ask for more."
        )
    return Decision(found, budget, reached, allocator.error(found), {"errors": rows})


def _next_effort(
    allocator: Allocator,
    plans: Any,
    plan: PrunePlan,
    error: float,
    bound: float,
    low: float,
    high: float,
) -> float:
    """Return the effort whose predicted error is to the last as the bound is to its error."""
    if high == 1.0 and low > 0 and error <= bound:
        ceiling = 1.0
    else:
        ceiling = high - 0.02 * (high - low)
    floor = low + 0.02 * (high - low)
    if not math.isfinite(error) or error <= 0:
        return (low + high) / 2
    wanted = allocator.error(plan) * bound / error
    first, last = floor, ceiling
    for _ in range(30):
        middle = (first + last) / 2
        if allocator.error(plans(middle)) < wanted:
            first = middle
        else:
            last = middle
    return last if last >= ceiling - 1e-6 else (first + last) / 2
