"""Prune a request package by package: the plan first, then each package along the pruned ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..allocation.budget import Budget
from ..allocation.decide import Decision, decide, make_allocator
from ..allocation.planning import PrunePlan, share_plan
from ..config_checks import measured_at_once
from ..distributed import World
from ..report import PackagesReport
from ..request import Job
from ..statistics.calibration import Calibration
from ..statistics.calibration_file import made_for
from ..statistics.collect import Collected, Progress
from ..statistics.gather import traced_settings, with_extras
from .engine import (
    Packages,
    Solved,
    Split,
    collect_package,
    solve_package,
    solve_packages,
    split_job,
)
from .state import PackageState, begun, code_version
from .structured import LayerPackages, trace_curves
from .units import Unit, layer_units
from .weights import WeightPackages


@dataclass(frozen=True)
class PackagesResult:
    """What pruning in packages gives.

    Args:
        kind: that solved them, and builds the network.
        solutions: of each stage, by name.
        decision: what layers give up; None where single weights go.
        packages: what they took.
    """

    kind: Packages
    solutions: Solved
    decision: Decision | None
    packages: PackagesReport


def in_packages(job: Job, state: str | Path | None) -> bool:
    """Tell whether a request goes package by package, or all at once."""
    config = job.config
    return (
        config.removes_weights or config.packages != 1 or config.memory is not None
        or state is not None or World.current().size > 1
    )  # fmt: skip


def prune_in_packages(
    job: Job, tell: Progress, folder: Path | None = None, resume: bool = False
) -> PackagesResult:
    """Solve a request in packages.

    Args:
        job: the request.
        tell: hears how far it is.
        folder: where each package is kept once it is solved; None keeps none.
        resume: whether the folder must hold a state already; otherwise it must not.

    Raises:
        ValueError: the packages do not fit into the memory allowed, or the state is another's.
    """
    name = measured_at_once(job.config)
    if name is not None:
        raise ValueError(
            f"prune: {name} must not measure the whole network at once where a state is kept or "
            f"several processes work, got {getattr(job.config, name)!r}. Prune in one process, "
            "without a state."
        )
    weights, split = split_request(job)
    state = _open_state(job, split, folder, resume)
    decision, seen = None, None
    kind: Packages | None = weights
    if kind is None:
        decision, seen = _decide(job, split, state, tell)
        kind = LayerPackages(job, decision.plan)
    solved = solve_packages(job, kind, split, state, tell, seen)
    packages = PackagesReport(
        len(split.packages), split.memory, split.expected_bytes, split.peak.bytes
    )
    return PackagesResult(kind, solved, decision, packages)


def split_request(job: Job) -> tuple[WeightPackages | None, Split]:
    """Split a request into packages; nothing is run.

    Raises:
        ValueError: they do not fit into the memory allowed.
    """
    weights = WeightPackages(job) if job.config.removes_weights else None
    units = weights.units if weights is not None else layer_units(job.denoiser, job.layers)
    return weights, split_job(job, units)


def _open_state(job: Job, split: Split, folder: Path | None, resume: bool) -> PackageState | None:
    if folder is None or not World.current().is_first:
        return None
    there = (folder / "state.json").is_file()
    if resume and not there:
        raise ValueError(
            f"prune: resume must name a folder that pruning in packages wrote, got {folder}. "
            "Leave it out to begin."
        )
    if there and not resume and not begun(folder):
        (folder / "state.json").unlink()  # it ended before anything was solved: nothing is lost
    elif there and not resume:
        raise ValueError(
            f"prune: {folder} holds the packages of a run that was not finished. Go on with it "
            f"(--resume {folder}), or delete it."
        )
    return PackageState(folder, _fingerprint(job, split))


def _fingerprint(job: Job, split: Split) -> dict[str, Any]:
    """Say all that decides the result."""
    of_model = made_for(job.denoiser, job.scheduler, job.config, job.prompts)
    sampler = {k: v for k, v in job.scheduler.config.items() if not k.startswith("_")}
    config = job.config.to_dict()
    config.pop("memory")  # it decides the packages, which are named
    return {
        "model": [of_model["class"], of_model["dtype"], of_model["model"]],
        "schedule": [
            of_model["schedule"],
            type(job.scheduler).__name__,
            repr(sorted(sampler.items())),
        ],
        "config": config,
        "calibration": [_data_digest(job), of_model.get("prompts")],
        "measured": None if job.measured is None else dict(job.measured.made_for),
        "packages": [[name for unit in part for name in unit.widths] for part in split.packages],
        "code": code_version(),
    }


def _data_digest(job: Job) -> str | None:
    if job.data is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for latents, inputs in job.data.chunks():
        for name, tensor in [("", latents), *sorted(inputs.items())]:
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _decide(
    job: Job, split: Split, state: PackageState | None, tell: Progress
) -> tuple[Decision, Collected | None]:
    """Return what each layer gives up, and the statistics that are still good for solving it."""
    world = World.current()
    kept = world.from_first(None if state is None else state.read_plan())
    frame, config = job.frame, job.config
    if kept is not None:
        removed = tuple(tuple(row) for row in kept.pop("removed"))
        shares = tuple(kept.pop("shares"))
        plan = PrunePlan(frame.division, frame.steps, shares, job.layers, removed)
        return Decision(plan, Budget(**kept.pop("budget")), **kept), None
    seen = None
    by_share = config.allocation in ("score", "uniform", "explicit")
    by_rule = by_share and config.budget.unit == "sparsity" and job.measured is None
    if by_rule:
        plan = share_plan(job.layers, frame, config, config.budget.value)
        budget = config.budget
        if config.allocation == "explicit":
            budget = Budget("sparsity", plan.sparsity)
        reached = None if config.allocation == "explicit" else plan.sparsity
        decision = Decision(plan, budget, reached, float("nan"))
    else:
        measured = job.measured
        if measured is None:
            measured, seen = _measure(job, split, tell)
        allocator, fitter = make_allocator(job, measured, tell)
        decision = decide(job, allocator, fitter, tell)
    decision = world.from_first(decision)
    if state is not None and not by_rule:  # a rule is followed again; what was measured is kept
        state.write_plan(
            {
                "removed": decision.plan.removed,
                "shares": decision.plan.shares,
                "budget": vars(decision.budget),
                "reached": decision.reached,
                "predicted_error": decision.predicted_error,
                "measured": decision.measured,
            }
        )
    return decision, seen


def _measure(job: Job, split: Split, tell: Progress) -> tuple[Calibration, Collected | None]:
    """Trace every layer's curves along the dense network, one package in memory at a time."""
    stages = len(job.frame.division)
    curves: list[dict[str, Any]] = [{} for _ in range(stages)]
    seen: Collected | None = None

    def solve(units: Sequence[Unit], statistics: Collected) -> list[dict[str, Any]]:
        return trace_curves(job, units, statistics)

    world = World.current()
    for p, package in enumerate(split.packages):
        what = f"measure package {p + 1} of {len(split.packages)}:"
        seen = None  # freed before the next package's are collected
        seen = collect_package(job, split, package, job.denoiser, tell, what)
        found = solve_package(solve, split, package, seen, tell, what)
        for row, part in zip(curves, found, strict=True):
            row.update(world.merged(part))
    frame = job.frame
    measured = Calibration(
        frame.division, frame.steps, job.layers, frame.power, [{} for _ in range(stages)],
        curves=curves, traced_with=traced_settings(job.config),
    )  # fmt: skip
    return with_extras(job, measured), seen if len(split.packages) == 1 else None
