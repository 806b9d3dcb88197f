"""Orchestration: from a model and a configuration to a staged denoiser. No mathematics."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from .adapters import adapter_for
from .allocation.decide import decide, make_allocator
from .allocation.latency_budget import with_latencies
from .allocation.planning import PrunePlan, make_frame, share_plan
from .config import PruneConfig
from .groups import Denoiser
from .inputs.asked import CalibrationSource
from .inputs.resting import encoders_at_rest
from .packages.prune import in_packages, prune_in_packages
from .report import PruneReport
from .reporting import report_of
from .request import Job, allowed_layers, prepare, sampling_of
from .runtime import StagedDenoiser
from .shared_norms import fold_statistics, with_norm_errors
from .solving.fit import assemble, last_groups_removed
from .sources import find_denoisers, source_name
from .statistics.calibration import Calibration
from .statistics.calibration_file import made_for
from .statistics.gather import Progress, gather, trace
from .statistics.prompts import PromptSource


@dataclass(frozen=True)
class PruneResult:
    """What `prune` gives.

    Args:
        denoiser: the staged one.
        report: what was done.
        pipeline: that now holds it.
        component: under which name; None of a bare denoiser.
        others: the same of the pipeline's other denoisers, where it has two.
    """

    denoiser: StagedDenoiser = field(repr=False)
    report: PruneReport = field(repr=False)
    pipeline: DiffusionPipeline | None = field(default=None, repr=False)
    component: str | None = None
    others: tuple[PruneResult, ...] = ()

    def __str__(self) -> str:
        return f"PruneResult({self.component or 'denoiser'}, sparsity {self.report.sparsity:.2%})"


def plan(
    model: DiffusionPipeline | Denoiser,
    config: PruneConfig | None = None,
    *,
    scheduler: Any = None,
    calibration: CalibrationSource = None,
    measured: Calibration | str | Path | None = None,
    prompts: PromptSource = None,
    cache: bool = True,
    component: str | None = None,
) -> PrunePlan:
    """Check a request and say what it would remove, without running the model.

    Arguments and errors are those of `prune`; of a pipeline with two denoisers, the plan is of
    `component`, by default of the one that is called first.

    Raises:
        ValueError: what is removed depends on a calibration that is not there yet.
    """
    asked = config or PruneConfig()
    return plan_of(
        prepare(
            model, asked, scheduler, calibration, measured, prompts,
            cache=cache, component=component,
        )
    )  # fmt: skip


def plan_of(job: Job) -> PrunePlan:
    """Return the plan of a checked request; see `plan`."""
    unit = job.config.budget.unit
    if job.config.removes_weights:
        raise ValueError(
            f"plan: granularity must remove groups, got {job.config.granularity!r}: single weights "
            "are chosen while they are removed. Prune."
        )
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
    cache: bool = True,
    search_state: str | Path | None = None,
    state: str | Path | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    component: str | None = None,
) -> PruneResult:
    """Divide, calibrate, allocate, prune and pack a denoiser, or both of a pipeline that has two.

    Each of two is planned within the sampling steps that it is called at, and meets the budget by
    itself; both are calibrated with the other dense. A budget of MACs of an image is then of the
    steps of each.

    Args:
        model: a pipeline, whose denoiser is replaced when all is done, or a bare denoiser, which
            is left as it is.
        config: what to do; the defaults remove 30%.
        scheduler: of a bare denoiser; of a pipeline the default is its own.
        calibration: clean latents: batches of (latents (B, ...), other forward arguments),
            or, for a pipeline, a path (a folder of images with captions or by class, a
            `.safetensors` or `.npz`, or a folder of those; see `sources.load_calibration`). The
            embedded `digits` pipeline needs none, nor does `activations="trajectory"`: what
            needs clean latents takes those that the pipeline draws, and the closed-form stages
            take a power of 1.
        measured: what `calibrate` gave, or its file: then the model is not run again, but for
            budgets and searches that measure the result.
        prompts: of `activations="trajectory"`: texts, or labels (numbers or names) of a
            class-conditional pipeline, or a file of them (`.txt` with one in a line, `.json`,
            `.jsonl`, `.csv`, `.tsv`; `PromptFile` names a column). Labels may be left out: then
            all classes are drawn evenly. Of `activations="noised"`: captions of the images or
            latents of a path that has none, in the order of file names.
        cache: whether encoded images and captions are kept in the user's cache folder and taken
            from there.
        search_state: file that keeps an evolutionary search; one that is there is gone on with.
        state: new folder that keeps every package once it is solved.
        resume: such a folder that an interrupted run left, to go on from.
        progress: hears how far the work is.
        component: name of the one denoiser to prune, of a pipeline with two. Needed with
            `measured` and `search_state`, which are of one.

    Returns:
        The staged denoiser, callable like the original, its report and the pipeline.

    Raises:
        ValueError: the request cannot be met; raised before work starts where that can be known,
            and nothing is changed.
        RuntimeError: a layer's Hessian could not be inverted under any allowed damping.
    """
    if state is not None and resume is not None:
        raise ValueError(
            f"prune: state must be left out with resume, which names the folder, got {state}."
        )
    asked = config or PruneConfig()
    names = _components(model, component)
    if len(names) > 1:
        _refuse_shared(names, measured=measured, search_state=search_state)
        if calibration is not None and not isinstance(calibration, (str, Path)):
            calibration = list(calibration)  # read once for each
    jobs = [
        prepare(
            model, asked, scheduler, calibration, measured, prompts, component=name, cache=cache
        )
        for name in names
    ]
    folder = resume if state is None else state
    results = []
    for job in jobs:
        tell = _naming(progress or _silent, job.component if len(jobs) > 1 else None)
        where = None if folder is None else Path(folder)
        going_on = resume is not None
        if where is not None and len(jobs) > 1:
            where = where / str(job.component)
            going_on = where.is_dir()  # an interrupted run may not have come to the second
        results.append(_prune_one(job, tell, search_state, where, going_on))
    for result in results:  # when all is done
        if result.pipeline is not None:
            result.pipeline.register_modules(**{str(result.component): result.denoiser})
    return replace(results[0], others=tuple(results[1:]))


def _prune_one(
    job: Job, tell: Progress, search_state: str | Path | None, folder: Path | None, resume: bool
) -> PruneResult:
    """Carry out a checked request; the pipeline still holds the dense denoiser."""
    started = time.perf_counter()
    # A bare denoiser stays the caller's own: the stages get tensors of theirs.
    base = job.denoiser if job.pipeline is not None else copy.deepcopy(job.denoiser)
    with encoders_at_rest(_done_with_texts(job)):
        if in_packages(job, folder):
            done = prune_in_packages(job, tell, folder, resume)
            staged = done.kind.network(base, done.solutions)
            report = report_of(job, staged, done.decision, done.solutions, done.packages)
        else:
            staged, report = _prune_at_once(job, base, tell, search_state)
        if job.config.shared_norms != "exact":
            fold_statistics(job, staged)
            report = with_norm_errors(job, staged, report)
    staged.info.source = source_name(job.pipeline)
    seconds = time.perf_counter() - started
    report = replace(report, seconds=seconds, component=job.component)
    staged.info.report = report.to_dict()
    return PruneResult(staged, report, job.pipeline, job.component)


def _done_with_texts(job: Job) -> DiffusionPipeline | None:
    """Return the pipeline whose text encoders are not needed again: it is not sampled."""
    return job.pipeline if job.config.activations == "noised" else None


def _components(model: DiffusionPipeline | Denoiser, component: str | None) -> Sequence[str | None]:
    """Name the denoisers to prune."""
    if component is not None or not isinstance(model, DiffusionPipeline):
        return [component]
    return [part.name for part in find_denoisers(model)]


def _refuse_shared(names: Sequence[str | None], **given: Any) -> None:
    """Refuse what belongs to one denoiser where several are to be pruned."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"prune: component must be one of {', '.join(map(str, names))} with {name}, which "
                "is of one denoiser, got None. Prune one after the other."
            )


def _naming(tell: Progress, component: str | None) -> Progress:
    """Let progress say which denoiser is worked on."""
    if component is None:
        return tell
    return lambda what, done, total: tell(f"{component}: {what}", done, total)


def _prune_at_once(
    job: Job, base: Denoiser, tell: Progress, search_state: str | Path | None
) -> tuple[StagedDenoiser, PruneReport]:
    if job.config.budget.unit == "latency":
        job = with_latencies(job, tell)
    given = job.measured if job.measured is not None else gather(job, tell)
    allocator, fitter = make_allocator(job, given, tell)
    decision = decide(
        job, allocator, fitter, tell, None if search_state is None else Path(search_state)
    )
    solutions = fitter.solve(decision.plan, lambda done, total: tell("fit layers", done, total))
    staged = assemble(job.adapter, base, decision.plan, job.config, solutions)
    return staged, report_of(job, staged, decision, solutions)


def calibrate(
    model: DiffusionPipeline | Denoiser,
    config: PruneConfig | None = None,
    *,
    scheduler: Any = None,
    calibration: CalibrationSource = None,
    prompts: PromptSource = None,
    cache: bool = True,
    progress: Progress | None = None,
    component: str | None = None,
) -> Calibration:
    """Measure all that pruning needs of a model, once for every budget.

    Arguments and errors are those of `prune`; of a pipeline with two denoisers, `component` is
    measured, by default the one that is called first. With `stages="auto"` the bins are kept, and
    the stages may be put wherever bins meet; otherwise the curves of the stages are traced too.
    """
    asked = config or PruneConfig()
    job = prepare(
        model, asked, scheduler, calibration, prompts=prompts, cache=cache, component=component
    )
    return calibrate_job(job, progress or _silent)


def calibrate_job(job: Job, tell: Progress) -> Calibration:
    """Calibrate a checked request; see `calibrate`."""
    if job.config.removes_weights:
        raise ValueError(
            f"calibrate: granularity must remove groups, got {job.config.granularity!r}: "
            "statistics are kept of those alone. Prune without."
        )
    made = made_for(job.denoiser, job.scheduler, job.config, job.prompts)
    with encoders_at_rest(_done_with_texts(job)):
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
    layers = allowed_layers(adapter, denoiser, config)
    frame = make_frame(scheduler, config, None, sampling_of(adapter, denoiser))
    made = share_plan(layers, frame, config, config.budget.value)
    return assemble(adapter, denoiser, made, config, last_groups_removed(denoiser, made))


def _silent(what: str, done: int, total: int) -> None:
    pass
