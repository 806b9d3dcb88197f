"""Meet a budget of milliseconds: by a table of layer shapes, then by measuring the result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..evaluate.latency import measure_latency
from ..request import Job
from ..solving.fit import assemble, last_groups_removed
from ..statistics.gather import Progress
from .allocator import Allocator
from .budget import TOLERANCE, Budget
from .latency import LatencyTable, latency_table, shape_of
from .planning import PrunePlan, effort_bounds

#: Corrections of the prediction by a measurement, at most.
_ROUNDS = 8
#: Milliseconds that one measurement may take, about, and its repeats.
_SPEND, _LEAST, _MOST = 3000.0, 10, 100


def with_latencies(job: Job, tell: Progress) -> Job:
    """Add to a request's costs what its layers take on this device, and check the budget again.

    Raises:
        ValueError: the table that was named is of another device, type, batch or model, or the
            budget is out of reach.
    """
    config, done = job.config, 0

    def advance() -> None:
        nonlocal done
        done += 1
        tell("time layers", min(done, 11), 11)

    if config.latency_table is not None:
        table = LatencyTable.load(config.latency_table)
        table.check(job.denoiser, config.latency_batch, config.shared_norms)
    else:
        table = latency_table(
            job.denoiser, job.adapter, batch_size=config.latency_batch,
            shared_norms=config.shared_norms, advance=advance,
        )  # fmt: skip
    curves = [table.curve(shape_of(job.denoiser, layer)) for layer in job.layers]
    # Layers timed alone may come to more than the whole call: then they count for less.
    scale = table.dense_ms / (table.dense_ms + table.excess_ms)
    costs = job.costs.with_latency([scale * curve for curve in curves], table.fixed_ms)
    effort_bounds(job.layers, job.frame, config, costs)
    return replace(job, costs=costs)


def decide_by_latency(
    job: Job, allocator: Allocator, tell: Progress
) -> tuple[PrunePlan, float, dict[str, Any]]:
    """Plan by the table, measure a network of the plan's shapes, and correct until within 2%.

    Returns:
        The plan, the milliseconds of a call (mean over the steps), and the measurements.

    Raises:
        ValueError: the table cannot be met, or the measurements do not come within 2%.
    """
    budget = job.config.budget
    predicted_dense = allocator.costs.dense("latency")
    aim = budget.target(predicted_dense)
    rows: list[dict[str, float]] = []
    best: tuple[float, PrunePlan, float] | None = None
    for number in range(_ROUNDS):
        tell("time plans", number, _ROUNDS)
        plan = allocator.meet(Budget("latency", aim))
        dense_ms, pruned_ms = _measure(job, plan, predicted_dense)
        wanted = budget.target(dense_ms)
        rows.append({"aim": aim, "dense_ms": dense_ms, "pruned_ms": pruned_ms, "wanted": wanted})
        miss = abs(pruned_ms / wanted - 1)
        if best is None or miss < best[0]:
            best = (miss, plan, pruned_ms)
        if miss <= TOLERANCE:
            break
        # Halfway in the logarithm once it is close: a measurement is not exact either.
        aim *= (wanted / pruned_ms) ** (1.0 if miss > 3 * TOLERANCE else 0.6)
        low = allocator.costs.cost("latency", allocator.plans("latency")(1.0).removed)
        aim = min(max(aim, low), predicted_dense)
    tell("time plans", _ROUNDS, _ROUNDS)
    assert best is not None
    miss, plan, reached = best
    if miss > TOLERANCE:
        raise ValueError(
            f"budget: {budget} must be met within {TOLERANCE:.0%}, but the closest of "
            f"{len(rows)} measurements was {reached:.3g} ms, {miss:.1%} off. Is the machine busy? "
            "Try again, or give the budget in macs."
        )
    return plan, reached, {"latency": rows}


def _measure(job: Job, plan: PrunePlan, predicted: float) -> tuple[float, float]:
    """Time the dense call and calls of a plan's shapes in turn; milliseconds of each."""
    staged = assemble(
        job.adapter, job.denoiser, plan, job.config, last_groups_removed(job.denoiser, plan)
    )
    repeats = int(min(_MOST, max(_LEAST, _SPEND / (predicted * (1 + len(plan.steps))))))
    report = measure_latency(
        job.denoiser, staged, batch_size=job.config.latency_batch, repeats=repeats
    )
    return report.dense.milliseconds, report.dense.milliseconds / report.speedup
