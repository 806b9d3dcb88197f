"""Orchestration: from a model and a configuration to a staged denoiser. No mathematics."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .adapters import adapter_for
from .allocation.allocator import Allocator
from .allocation.decide import Decision, decide
from .allocation.latency_budget import with_latencies
from .allocation.planning import PrunePlan, make_frame, share_plan
from .checkpoint import storage_of
from .config import PruneConfig
from .groups import Denoiser
from .report import DecisionReport, LayerReport, PruneReport, StageReport
from .request import CalibrationSource, Job, prepare
from .runtime import StagedDenoiser
from .solving.fit import Fitter, Solutions, assemble, last_groups_removed
from .sources import source_name
from .statistics.calibration import Calibration
from .statistics.calibration_file import made_for
from .statistics.gather import Progress, gather, trace, weights_of
from .statistics.prompts import PromptSource
from .trajectory.segment import settle_stages


@dataclass(frozen=True)
class PruneResult:
    """What `prune` gives: the staged denoiser, the report, and the pipeline that now holds it."""

    denoiser: StagedDenoiser
    report: PruneReport
    pipeline: DiffusionPipeline | None = None


def plan(
    model: DiffusionPipeline | Denoiser,
    config: PruneConfig | None = None,
    *,
    scheduler: Any = None,
    calibration: CalibrationSource = None,
    measured: Calibration | str | Path | None = None,
    prompts: PromptSource = None,
) -> PrunePlan:
    """Check a request and say what it would remove, without running the model.

    Arguments and errors are those of `prune`.

    Raises:
        ValueError: what is removed depends on a calibration that is not there yet.
    """
    return plan_of(
        prepare(model, config or PruneConfig(), scheduler, calibration, measured, prompts)
    )


def plan_of(job: Job) -> PrunePlan:
    """Return the plan of a checked request; see `plan`."""
    unit = job.config.budget.unit
    if unit in ("quality", "latency") or job.config.allocation == "evolutionary":
        raise ValueError(
            f"plan: budget must be in sparsity, macs, params or size, and allocation not "
            f"evolutionary, got {job.config.budget} and {job.config.allocation!r}: only measuring "
            "the pruned model tells what those remove. Prune."
        )
    if job.measured is not None:
        return decide(job, *make_allocator(job, job.measured, _silent), _silent).plan
    if job.config.allocation not in ("score", "uniform", "explicit") or unit != "sparsity":
        raise ValueError(
            f"plan: measured must be given for allocation {job.config.allocation!r} and a budget "
            f"of {unit}, got None. What is removed depends on the calibration: make it with "
            "`mosaicdiff calibrate`, or prune."
        )
    return share_plan(job.layers, job.frame, job.config, job.config.budget.value)


def prune(
    model: DiffusionPipeline | Denoiser,
    config: PruneConfig | None = None,
    *,
    scheduler: Any = None,
    calibration: CalibrationSource = None,
    measured: Calibration | str | Path | None = None,
    prompts: PromptSource = None,
    search_state: str | Path | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Divide, calibrate, allocate, prune and pack a denoiser.

    Args:
        model: a pipeline, whose denoiser is replaced when all is done, or a bare denoiser, which
            is left as it is.
        config: what to do; the defaults remove 30%.
        scheduler: of a bare denoiser; of a pipeline the default is its own.
        calibration: clean latents: batches of (latents (B, C, H, W), other forward arguments),
            or, for a pipeline, a path (a folder of images, `.npz`, `.safetensors`). The
            embedded `digits` pipeline needs none, nor does `activations="trajectory"`: what
            needs clean latents takes those that the pipeline draws, and the closed-form stages
            take a power of 1.
        measured: what `calibrate` gave, or its file: then the model is not run again, but for
            budgets and searches that measure the result.
        prompts: of `activations="trajectory"`: texts, or labels (numbers or names) of a
            class-conditional pipeline, or a `.txt` file with one in a line. Labels may be left
            out: then all classes are drawn evenly.
        search_state: file that keeps an evolutionary search; one that is there is gone on with.
        progress: hears how far the work is.

    Returns:
        The staged denoiser, callable like the original, its report and the pipeline.

    Raises:
        ValueError: the request cannot be met; raised before work starts where that can be known,
            and nothing is changed.
        RuntimeError: a layer's Hessian could not be inverted under any allowed damping.
    """
    started = time.perf_counter()
    job = prepare(model, config or PruneConfig(), scheduler, calibration, measured, prompts)
    tell = progress or _silent
    if job.config.budget.unit == "latency":
        job = with_latencies(job, tell)
    given = job.measured if job.measured is not None else gather(job, tell)
    allocator, fitter = make_allocator(job, given, tell)
    decision = decide(
        job, allocator, fitter, tell, None if search_state is None else Path(search_state)
    )
    solutions = fitter.solve(decision.plan, lambda done, total: tell("fit layers", done, total))
    # A bare denoiser stays the caller's own: the stages get tensors of theirs.
    base = job.denoiser if job.pipeline is not None else copy.deepcopy(job.denoiser)
    staged = assemble(job.adapter, base, decision.plan, job.config, solutions)
    staged.info.source = source_name(job.pipeline)
    report = _make_report(job, staged, decision, solutions, time.perf_counter() - started)
    staged.info.report = report.to_dict()
    if job.pipeline is None or job.component is None:
        return PruneResult(staged, report)
    job.pipeline.register_modules(**{job.component: staged})
    return PruneResult(staged, report, job.pipeline)


def calibrate(
    model: DiffusionPipeline | Denoiser,
    config: PruneConfig | None = None,
    *,
    scheduler: Any = None,
    calibration: CalibrationSource = None,
    prompts: PromptSource = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure all that pruning needs of a model, once for every budget.

    Arguments and errors are those of `prune`. With `stages="auto"` the bins are kept, and the
    stages may be put wherever bins meet; otherwise the curves of the stages are traced too.
    """
    job = prepare(model, config or PruneConfig(), scheduler, calibration, prompts=prompts)
    return calibrate_job(job, progress or _silent)


def calibrate_job(job: Job, tell: Progress) -> Calibration:
    """Calibrate a checked request; see `calibrate`."""
    made = made_for(job.denoiser, job.scheduler, job.config, job.prompts)
    measured = replace(gather(job, tell), made_for=made)
    return measured if job.config.stage_count == "auto" else trace(job, measured, tell)


def cut(denoiser: Denoiser, config: PruneConfig, *, scheduler: Any) -> StagedDenoiser:
    """Remove the last groups of every layer as shares plan it, with no calibration.

    For timing: the shapes are those of `prune` by `score`, `uniform` or `explicit`, the weights
    mean nothing. The stages share the denoiser's own modules.

    Raises:
        ValueError: another allocation, or a budget that is not a sparsity.
    """
    if config.allocation not in ("score", "uniform", "explicit"):
        raise ValueError(
            f"cut: allocation must be score, uniform or explicit, got {config.allocation!r}: "
            "without calibration nothing is known of the layers."
        )
    if config.budget.unit != "sparsity":
        raise ValueError(f"cut: budget must be a sparsity, got {config.budget}.")
    adapter = adapter_for(denoiser)
    layers = adapter.layers(denoiser)
    made = share_plan(layers, make_frame(scheduler, config), config, config.budget.value)
    return assemble(adapter, denoiser, made, config, last_groups_removed(denoiser, made))


def _silent(what: str, done: int, total: int) -> None:
    pass


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


def _make_report(
    job: Job, staged: StagedDenoiser, decision: Decision, solutions: Solutions, seconds: float
) -> PruneReport:
    made = decision.plan
    dense, pruned = job.adapter.macs(job.denoiser), staged.macs()
    mean, mean_with_attention = staged.mean_macs()
    stages = []
    for k, (stage, macs) in enumerate(zip(made.division.stages, pruned, strict=True)):
        rows = []
        for layer in made.layers:
            solution = solutions[k].get(layer.name)
            kept, error, damping = (
                (layer.groups, 0.0, 0.0)
                if solution is None
                else (len(solution.kept), solution.error, solution.damping)
            )
            rows.append(LayerReport(layer.name, layer.kind, layer.groups, kept, error, damping))
        stages.append(
            StageReport(
                stage.name,
                stage.first,
                stage.last,
                made.steps[k],
                made.stage_sparsity(k),
                macs.linear,
                macs.total,
                rows,
            )
        )
    stored = [t for name, t in storage_of(staged)[0].items() if not name.startswith("kept.")]
    steps = made.steps
    per_step = [sum(p.numel() for p in stage.parameters()) for stage in staged.stage_models]
    return PruneReport(
        stages=stages,
        sparsity=made.sparsity,
        latent_power=job.frame.power,
        macs_dense=dense.linear,
        macs_dense_with_attention=dense.total,
        macs=mean,
        macs_with_attention=mean_with_attention,
        parameters_dense=sum(p.numel() for p in job.denoiser.parameters()),
        parameters=sum(t.numel() for t in stored),
        parameters_per_step=sum(n * c for n, c in zip(per_step, steps, strict=True)) / sum(steps),
        bytes_dense=_bytes(job.denoiser.parameters()),
        bytes=_bytes(stored),
        resident_bytes=_bytes(staged.parameters()),
        seconds=seconds,
        decision=DecisionReport(
            allocation=job.config.allocation,
            budget=str(decision.budget),
            reached=decision.reached,
            predicted_error=decision.predicted_error,
            measured=decision.measured,
        ),
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
