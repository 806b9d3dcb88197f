"""Orchestration: from a model and a configuration to a staged denoiser. No mathematics."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .adapters import Adapter, adapter_for
from .bank import HessianBank
from .calibrate import Batch, CalibrationSet, collect_statistics
from .checkpoint import storage_of
from .config import PruneConfig
from .groups import Denoiser, PrunableLayer
from .pack import Parts, dense_parts, narrow_parts
from .planning import PrunePlan, make_plan
from .report import LayerReport, PruneReport, StageReport
from .runtime import LayerState, StagedDenoiser, StageInfo
from .schedule import NoiseSchedule
from .solve import LayerProblem, LayerSolution, solve_layers
from .sources import find_denoiser, load_calibration, source_name

#: Called with (what is being done, how much is done, how much there is).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PruneResult:
    """What `prune` gives: the staged denoiser, the report, and the pipeline that now holds it."""

    denoiser: StagedDenoiser
    report: PruneReport
    pipeline: DiffusionPipeline | None = None


@dataclass(frozen=True)
class _Job:
    """A checked request: everything that can be refused has been looked at."""

    denoiser: Denoiser
    adapter: Adapter
    scheduler: Any
    data: CalibrationSet
    plan: PrunePlan
    config: PruneConfig
    pipeline: DiffusionPipeline | None
    component: str | None


def plan(
    model: DiffusionPipeline | Denoiser,
    config: PruneConfig | None = None,
    *,
    scheduler: Any = None,
    calibration: str | Path | Iterable[Batch] | None = None,
) -> PrunePlan:
    """Check a request and say what it would remove, without running the model.

    Arguments and errors are those of `prune`.
    """
    return _prepare(model, config or PruneConfig(), scheduler, calibration).plan


def prune(
    model: DiffusionPipeline | Denoiser,
    config: PruneConfig | None = None,
    *,
    scheduler: Any = None,
    calibration: str | Path | Iterable[Batch] | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Divide, allocate, calibrate, prune and pack a denoiser.

    Args:
        model: a pipeline, whose denoiser is replaced when all is done, or a bare denoiser, which
            is left as it is.
        config: what to do; the defaults remove 30%.
        scheduler: of a bare denoiser; of a pipeline the default is its own.
        calibration: clean latents: batches of (latents (B, C, H, W), other forward arguments),
            or, for a pipeline, a path (a folder of images, `.npz`, `.safetensors`). The
            embedded `digits` pipeline needs none.
        progress: hears how far the work is.

    Returns:
        The staged denoiser, callable like the original, its report and the pipeline.

    Raises:
        ValueError: the request cannot be met; raised before work starts, nothing is changed.
        RuntimeError: a layer's Hessian could not be inverted under any allowed damping.
    """
    started = time.perf_counter()
    job = _prepare(model, config or PruneConfig(), scheduler, calibration)
    tell = progress or (lambda what, done, total: None)
    solutions = _solve_stages(job, tell)
    # A bare denoiser stays the caller's own: the stages get tensors of theirs.
    base = job.denoiser if job.pipeline is not None else copy.deepcopy(job.denoiser)
    staged = _assemble(base, job.adapter, job.plan, job.config, solutions)
    staged.info.source = source_name(job.pipeline)
    report = _make_report(job, staged, solutions, time.perf_counter() - started)
    staged.info.report = report.to_dict()
    if job.pipeline is None or job.component is None:
        return PruneResult(staged, report)
    job.pipeline.register_modules(**{job.component: staged})
    return PruneResult(staged, report, job.pipeline)


def _prepare(
    model: DiffusionPipeline | Denoiser,
    config: PruneConfig,
    scheduler: Any,
    calibration: str | Path | Iterable[Batch] | None,
) -> _Job:
    pipeline = model if isinstance(model, DiffusionPipeline) else None
    component, denoiser = find_denoiser(pipeline) if pipeline is not None else (None, model)
    if isinstance(denoiser, StagedDenoiser):
        raise ValueError(
            "prune: model must be dense, but it is pruned already. Prune the original instead."
        )
    adapter = adapter_for(denoiser)
    adapter.check(denoiser)
    if scheduler is None:
        scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        raise ValueError(
            "prune: scheduler must be given with a bare denoiser, got None. "
            "It says how noisy each timestep is."
        )
    layers = adapter.layers(denoiser)
    # Refuse what no calibration could save before reading it; the power of its latents comes later.
    make_plan(layers, scheduler, config)
    if calibration is None or isinstance(calibration, (str, Path)):
        if pipeline is None:
            raise ValueError(
                "prune: calibration must be batches of (latents, inputs) with a bare denoiser, "
                f"got {calibration!r}."
            )
        calibration = load_calibration(calibration, pipeline)
    data = CalibrationSet(calibration, adapter, denoiser)
    final = make_plan(layers, scheduler, config, data.power)
    return _Job(denoiser, adapter, scheduler, data, final, config, pipeline, component)


def _solve_stages(job: _Job, tell: Progress) -> list[dict[str, LayerSolution]]:
    """Calibrate and solve stage after stage; a stage that gives nothing up is skipped."""
    generator = torch.Generator().manual_seed(job.config.seed)
    busy = [k for k, removed in enumerate(job.plan.removed) if any(removed)]
    total, done = len(busy) * job.config.samples, 0
    solutions: list[dict[str, LayerSolution]] = [{} for _ in job.plan.removed]
    training = job.denoiser.training
    job.denoiser.eval()
    try:
        for k in busy:
            name = job.plan.division.stages[k].name

            def advance(rows: int, name: str = name) -> None:
                nonlocal done
                done += rows
                tell(f"calibrate {name}", done, total)

            bank = _calibrate(job, k, advance)
            tell(f"prune {name}", done, total)
            solutions[k] = _solve(job, k, bank, generator)
    finally:
        job.denoiser.train(training)
    return solutions


def _chosen(job: _Job, stage: int) -> list[tuple[PrunableLayer, int]]:
    """List the layers of a stage that give something up, with how many groups."""
    rows = zip(job.plan.layers, job.plan.removed[stage], strict=True)
    return [(layer, count) for layer, count in rows if count]


def _calibrate(job: _Job, stage: int, advance: Callable[[int], None]) -> HessianBank:
    return collect_statistics(
        job.denoiser,
        job.adapter,
        [layer for layer, _ in _chosen(job, stage)],
        job.plan.division.stages[stage],
        NoiseSchedule.from_scheduler(job.scheduler),
        job.data,
        job.config,
        advance,
    )


def _solve(
    job: _Job, stage: int, bank: HessianBank, generator: torch.Generator
) -> dict[str, LayerSolution]:
    problems = []
    for layer, remove in _chosen(job, stage):
        reader = job.denoiser.get_submodule(layer.reader)
        bias = None if reader.bias is None else reader.bias.detach()
        statistics = bank.finalize(layer.reader)
        problems.append(LayerProblem(layer, reader.weight.detach(), bias, statistics, remove))
    config = job.config
    solved = solve_layers(
        problems, config.criterion, config.compensation, config.damping, generator
    )
    return {p.layer.name: solution for p, solution in zip(problems, solved, strict=True)}


def cut(denoiser: Denoiser, config: PruneConfig, *, scheduler: Any) -> StagedDenoiser:
    """Remove the last groups of every layer as a configuration plans it, with no calibration.

    For timing: the shapes are those of `prune`, the weights mean nothing. The stages share the
    denoiser's own modules.
    """
    adapter = adapter_for(denoiser)
    layers = adapter.layers(denoiser)
    cut_plan = make_plan(layers, scheduler, config)
    solutions: list[dict[str, LayerSolution]] = []
    for removed in cut_plan.removed:
        solved = {}
        for layer, count in zip(layers, removed, strict=True):
            if count:
                kept = torch.arange(layer.groups - count)
                parts = narrow_parts(dense_parts(denoiser, layer), layer, kept)
                solved[layer.name] = LayerSolution(
                    kept,
                    parts[f"{layer.reader}.weight"],
                    parts.get(f"{layer.reader}.bias"),
                    float("nan"),
                    0.0,
                )
        solutions.append(solved)
    return _assemble(denoiser, adapter, cut_plan, config, solutions)


def _assemble(
    base: Denoiser,
    adapter: Adapter,
    final: PrunePlan,
    config: PruneConfig,
    solutions: list[dict[str, LayerSolution]],
) -> StagedDenoiser:
    layers = {layer.name: layer for layer in final.layers}
    states = []
    for solved in solutions:
        state = {}
        for name, solution in solved.items():
            layer = layers[name]
            parts: Parts = narrow_parts(dense_parts(base, layer), layer, solution.kept)
            parts[f"{layer.reader}.weight"] = solution.weight
            if config.compensation == "affine" and solution.bias is not None:
                parts[f"{layer.reader}.bias"] = solution.bias
            state[name] = LayerState(solution.kept, parts)
        states.append(state)
    info = StageInfo(
        base_class=adapter.denoiser_class,
        base_config={k: v for k, v in base.config.items() if not k.startswith("_")},
        division=final.division,
        layers=final.layers,
        kept=[{name: s.kept for name, s in solved.items()} for solved in solutions],
        steps=list(final.steps),
        prune_config=config.to_dict(),
    )
    return StagedDenoiser.assemble(base, info, states)


def _make_report(
    job: _Job, staged: StagedDenoiser, solutions: list[dict[str, LayerSolution]], seconds: float
) -> PruneReport:
    dense, pruned = job.adapter.macs(job.denoiser), staged.macs()
    mean, mean_with_attention = staged.mean_macs()
    stages = []
    for k, (stage, macs) in enumerate(zip(job.plan.division.stages, pruned, strict=True)):
        rows = []
        for layer in job.plan.layers:
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
                job.plan.steps[k],
                job.plan.stage_sparsity(k),
                macs.linear,
                macs.total,
                rows,
            )
        )
    stored = [t for name, t in storage_of(staged)[0].items() if not name.startswith("kept.")]
    steps = job.plan.steps
    per_step = [sum(p.numel() for p in stage.parameters()) for stage in staged.stage_models]
    return PruneReport(
        stages=stages,
        sparsity=job.plan.sparsity,
        latent_power=job.data.power,
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
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
