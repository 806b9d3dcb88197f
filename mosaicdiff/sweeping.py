"""A front of quality against cost: several budgets from one calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from .allocation.budget import UNITS, Budget
from .allocation.decide import make_allocator, measured_error
from .allocation.planning import effort_bounds
from .config import PruneConfig
from .groups import Denoiser
from .inputs.asked import CalibrationSource
from .request import prepare
from .statistics.calibration import Calibration
from .statistics.gather import Progress, gather, make_probe
from .statistics.prompts import PromptSource

#: Solved layers that are kept from one budget for the next.
_REMEMBER_BYTES = 1 << 30


@dataclass(frozen=True)
class FrontPoint:
    """One allocation at one budget.

    Args:
        allocation: that made the plan.
        budget: that was asked for.
        sparsity: share of the prunable MACs removed, mean over the steps.
        macs: of one image, all steps, with attention products.
        macs_ratio: those of the dense model over these.
        params: that a checkpoint would hold, all stages together.
        bytes: of its weights.
        predicted_error: the layers' weighted squared errors, summed over the steps.
        measured_error: squared error of the final latents over their energy; None where it was
            not measured.
        stages: sparsity of each stage, by name.
    """

    allocation: str
    budget: str
    sparsity: float
    macs: float
    macs_ratio: float
    params: float
    bytes: float
    predicted_error: float
    measured_error: float | None
    stages: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)


def sweep(
    model: DiffusionPipeline | Denoiser,
    budgets: Sequence[Budget],
    config: PruneConfig | None = None,
    *,
    allocations: Sequence[str] = ("optimal",),
    measure: bool = False,
    scheduler: Any = None,
    calibration: CalibrationSource = None,
    measured: Calibration | str | Path | None = None,
    prompts: PromptSource = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> list[FrontPoint]:
    """Plan several budgets from one calibration, and say what each costs and loses.

    Args:
        model: as `prune` takes it; it is left as it is.
        budgets: of sparsity, MACs, params or size.
        config: all but the budget and the allocation.
        allocations: of `score`, `uniform` and `optimal`; each makes a front.
        measure: whether to prune each, sample, and measure the error; else it is predicted.
        scheduler, calibration, measured, prompts, progress: as in `prune`.

    Raises:
        ValueError: as `prune`; or a budget of milliseconds or of quality, which need one run each.
    """
    config = config or PruneConfig()
    if not budgets:
        raise ValueError("sweep: budgets must name at least one, got none. E.g. 10%,20%,30%.")
    for budget in budgets:
        if budget.unit in ("latency", "quality"):
            raise ValueError(
                f"sweep: budgets must be of sparsity, macs, params or size, got {budget}. "
                "Give that one to prune."
            )
    for allocation in allocations:
        if allocation not in ("score", "uniform", "optimal"):
            raise ValueError(
                f"sweep: allocations must be of score, uniform, optimal, got {allocation!r}."
            )
    tell = progress or (lambda what, done, total: None)
    asked = [_config_for(config, b, a) for a in allocations for b in budgets]
    # The most that any of them needs is measured: `optimal` weighs errors, shares do not.
    main = next((one for one in asked if one.allocation == "optimal"), asked[0])
    job = prepare(model, main, scheduler, calibration, measured, prompts, cache=cache)
    for one in asked:  # all that can be refused before work starts
        effort_bounds(job.layers, job.frame, one, job.costs)
    given = job.measured if job.measured is not None else gather(job, tell)
    allocator, fitter = make_allocator(job, given, tell)
    fitter.remember(_REMEMBER_BYTES)
    probe = make_probe(job, "measured errors") if measure else None
    points, total = [], len(budgets) * len(allocations)
    for allocation in allocations:
        for budget in budgets:
            plan = allocator.meet(budget, allocation)
            error = None if probe is None else measured_error(probe, fitter, plan)
            macs = allocator.cost("macs", plan)
            points.append(
                FrontPoint(
                    allocation=allocation,
                    budget=str(budget),
                    sparsity=plan.sparsity,
                    macs=macs,
                    macs_ratio=allocator.costs.dense("macs") / macs,
                    params=allocator.cost("params", plan),
                    bytes=allocator.cost("size", plan),
                    predicted_error=allocator.error(plan),
                    measured_error=error,
                    stages={
                        stage.name: plan.stage_sparsity(k)
                        for k, stage in enumerate(plan.division.stages)
                    },
                )
            )
            tell("plan budgets", len(points), total)
    return points


def _config_for(config: PruneConfig, budget: Budget, allocation: str) -> PruneConfig:
    values: dict[str, Any] = dict.fromkeys(UNITS)
    suffix = "x" if budget.relative else "B" if budget.unit == "size" else ""
    values[budget.unit] = f"{budget.value!r}{suffix}"
    return replace(
        config, **values, allocation=allocation,
        stage_sparsity=None, layer_sparsity=None,
    )  # fmt: skip
