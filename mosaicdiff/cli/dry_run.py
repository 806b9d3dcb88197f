"""What `mosaicdiff prune --dry-run` prints: the plan, its packages, memory and time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .common import console, human_bytes, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..allocation.planning import PrunePlan
    from ..config import PruneConfig
    from ..request import Job
    from ..statistics.prompts import PromptSource
    from ..trajectory.stages import Division


def dry_run(
    pipe: Any,
    config: PruneConfig,
    calibration: str | None,
    measured: Path | None,
    prompts: PromptSource,
    cache: bool,
    component: str | None,
    as_json: bool,
) -> None:
    """Print the plan where it is known before calibration, and what carrying it out takes.

    Of a pipeline with two denoisers one after the other, where none is chosen.
    """
    from ..request import prepare
    from ..sources import find_denoisers

    names = [part.name for part in find_denoisers(pipe)] if component is None else [component]
    jobs = [
        prepare(pipe, config, None, calibration, measured, prompts, component=name, cache=cache)
        for name in names
    ]
    described = []
    for job in jobs:
        if len(jobs) > 1 and not as_json:
            console().rule(str(job.component))
        described.append(_describe(job, measured, as_json))
    if as_json:
        first = described[0] | {"config": config.to_dict()}
        print_json(first | {"others": described[1:]} if len(jobs) > 1 else first)


def _describe(job: Job, measured: Path | None, as_json: bool) -> dict[str, Any]:
    """Return what is known of one denoiser's request, and print it where that is wanted."""
    from ..estimate import estimate_cost
    from ..packages.prune import in_packages, split_request
    from ..pipeline import plan_of

    config = job.config
    unit, by_share = config.budget.unit, config.allocation in ("score", "uniform", "explicit")
    known = by_share and unit == "sparsity"
    if measured is not None and config.allocation != "evolutionary":
        known = unit not in ("latency", "quality")  # those run the model
    final = plan_of(job) if known and not config.removes_weights else None
    cost = None
    if not config.removes_weights:
        stages = len(job.frame.division)
        cost = estimate_cost(job.denoiser, job.adapter, job.layers, stages, config)
    packages: dict[str, int] = {}
    if in_packages(job, None):
        kind, split = split_request(job)
        packages = {"count": len(split.packages), "bytes": split.expected_bytes}
        if kind is not None:
            packages["linears"] = len(kind.targets)
    within = job.frame if final is None else final
    rows = _stage_rows(within.division, within.steps)
    if final is not None:
        for k, row in enumerate(rows):
            counts = zip(final.layers, final.removed[k], strict=True)
            row["sparsity"] = final.stage_sparsity(k)
            row["removed"] = {layer.name: count for layer, count in counts}
    if as_json:
        sparsity = None if final is None else final.sparsity
        values: dict[str, Any] = {"sparsity": sparsity, "budget": str(config.budget)}
        values |= {"stages": rows, "packages": packages or None, "component": job.component}
        return values | {"cost": cost}
    if packages:
        console().print(
            f"{packages['count']} package{'s' if packages['count'] > 1 else ''} of at most "
            f"{human_bytes(packages['bytes'])} beside the model and its activations",
            highlight=False,
        )
    if final is not None:
        _print_plan(final)
    elif config.removes_weights:
        console().print(
            f"{config.granularity}: {config.budget.value:.2%} of the weights of "
            f"{packages['linears']} linears",
            highlight=False,
        )
    else:
        shown = ", ".join(f"{r['name']} ({r['steps']} steps)" for r in rows)
        console().print(
            f"{config.allocation} allocation of {config.budget} over {shown}: what each layer "
            "gives is decided by the calibration (see mosaicdiff calibrate, and --from)",
            highlight=False,
        )
    if cost is None or packages:
        return {}
    console().print(
        f"memory for Hessians {human_bytes(cost['hessian_bytes'])} at once and "
        f"{human_bytes(cost['statistics_bytes'])} kept, for elimination "
        f"{human_bytes(cost['elimination_bytes'])}; about {cost['seconds']:.0f} s "
        f"(at {cost['rate'] / 1e9:.0f} GFLOP/s, measured)",
        highlight=False,
    )
    return {}


def _stage_rows(division: Division, steps: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "name": stage.name,
            "first_timestep": stage.first,
            "last_timestep": stage.last,
            "steps": count,
        }
        for stage, count in zip(division.stages, steps, strict=True)
    ]


def _print_plan(final: PrunePlan) -> None:
    from rich.table import Table

    table = Table(title=f"plan (nothing was run), mean sparsity {final.sparsity:.2%}")
    table.add_column("layer")
    table.add_column("dense", justify="right")
    for k, stage in enumerate(final.division.stages):
        table.add_column(
            f"{stage.name} t {stage.first + 1}..{stage.last + 1}\n{final.steps[k]} steps, "
            f"{final.stage_sparsity(k):.1%}",
            justify="right",
        )
    for index, layer in enumerate(final.layers):
        kept = [str(layer.groups - removed[index]) for removed in final.removed]
        table.add_row(layer.name, f"{layer.groups} {layer.kind}", *kept)
    console().print(table)
