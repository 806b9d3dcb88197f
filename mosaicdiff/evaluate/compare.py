"""Dense beside pruned, in one run, at the same seeds and guidance, and each at its best."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..groups import leading_parameter
from ..sources import class_count, find_denoiser, source_name
from ..statistics.prompts import find_condition
from .cost import Calls, calls_of, pipeline_size, watched
from .evaluation import DENSE, PRUNED, Evaluation, Row, Setting, mark_best
from .quality import Judges, Tally, known_metrics
from .reference import Reference
from .sampling import balanced_labels, draws_video, sample_images

#: Pictures of a row that are kept: so many, while they fit into so many bytes; one at least.
_KEPT, _KEPT_BYTES = 100, 1 << 27
#: Pictures in d features below which the distance is mostly bias, as a multiple of d.
_FEW = 2


@dataclass
class _Run:
    """One model at one guidance scale, while it is sampled."""

    pipe: DiffusionPipeline
    tally: Tally
    calls: list[Calls]
    #: Of a picture, in each batch.
    seconds: list[float] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)

    def keep(self, images: torch.Tensor) -> None:
        held = sum(map(len, self.kept))
        fit = _KEPT_BYTES // (images[0].numel() * images.element_size())
        room = min(_KEPT, max(1, fit)) - held
        if room > 0:
            self.kept.append(images[:room].clone())


def compare(
    dense: DiffusionPipeline,
    pruned: DiffusionPipeline,
    *,
    judges: Judges | None = None,
    prompts: Sequence[str] | None = None,
    num_images: int = 200,
    steps: int | None = 50,
    guidance_scales: Sequence[float | None] = (1.0,),
    seed: int = 0,
    batch_size: int = 100,
    options: Mapping[str, Any] | None = None,
    best_by: str | None = None,
    names: Mapping[str, str] | None = None,
    command: str = "",
    advance: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Sample both models with the same noise, batch by batch in turn, and judge them.

    Each scale is sampled once, and serves both comparisons: at equal guidance, and each model at
    its own best.

    Args:
        dense: pipeline.
        pruned: pipeline of the same kind.
        judges: what is measured beside costs and the difference to the dense pictures.
        prompts: of pipelines that are asked in words, used in turn; None of those asked by
            class, whose labels run through all classes.
        num_images: of each model at each guidance scale.
        steps: None is the pipeline's own number.
        guidance_scales: None is the pipeline's own.
        seed: of the noise: picture i of every row starts from the same, as with `sample_images`.
        batch_size: pictures of a call.
        options: other arguments of the pipeline's call, e.g. height and width.
        best_by: name of the metric that chooses the best guidance; None is the Frechet distance
            where it is measured, else the first score of prompts, else none.
        names: of `dense` and `pruned`, for the record; None are those they were loaded by.
        command: that this is run by, for the record.
        advance: hears of every picture made (2 x `num_images` x scales in all).

    Raises:
        ValueError: pipelines of two kinds, too few pictures, a scale twice, or a metric that
            cannot choose; and what the judges refuse, all before the long run.
        Exception: of a pipeline, with the batch's number; see `sample_images`.
    """
    judges = Judges() if judges is None else judges
    scales = tuple(guidance_scales)
    _check(dense, pruned, judges, prompts, num_images, scales, batch_size)
    conditions: list[Any] = (
        balanced_labels(num_images, class_count(dense))
        if prompts is None
        else [prompts[i % len(prompts)] for i in range(num_images)]
    )
    kinds = {DENSE: dense, PRUNED: pruned}
    known = None if judges.network is None else judges.network.classes
    reads_labels = prompts is None and known == class_count(dense)
    sample = partial(sample_images, seed=seed, batch_size=batch_size, options=options)
    reference, best_by = _rehearse(
        kinds, judges, conditions[:batch_size], sample, steps, scales, best_by, reads_labels
    )
    runs = {
        (model, scale): _Run(pipe, Tally(judges, reads_labels), calls_of(pipe))
        for scale in scales
        for model, pipe in kinds.items()
    }
    for first in range(0, num_images, batch_size):
        chunk = conditions[first : first + batch_size]
        for scale in scales:
            made: dict[str, torch.Tensor] = {}
            for model in kinds:
                run = runs[model, scale]
                with watched(run.calls):
                    images, seconds = sample(
                        run.pipe, chunk, steps=steps, guidance_scale=scale,
                        first_image=first, advance=advance,
                    )  # fmt: skip
                made[model] = images
                run.seconds.append(seconds / len(chunk))
                run.tally.add(images, chunk, None if model == DENSE else made[DENSE])
                run.keep(images)
    sizes = {model: pipeline_size(pipe) for model, pipe in kinds.items()}
    rows = tuple(
        _row(model, scale, run, sizes[model], num_images, reference)
        for (model, scale), run in runs.items()
    )
    metrics = known_metrics(judges, reference, [dict(row.metrics) for row in rows])
    setting = Setting(
        models=dict(names or _names(dense, pruned)),
        pipeline=type(dense).__name__,
        denoiser=type(find_denoiser(dense)[1]).__name__,
        num_images=num_images,
        conditions=tuple(conditions),
        condition_kind="class_labels" if prompts is None else "prompt",
        guidance_scales=scales,
        steps=steps,
        seed=seed,
        batch_size=batch_size,
        options=dict(options or {}),
        network=None if judges.network is None else judges.network.name,
        reference=None if reference is None else reference.name,
        reference_images=None if reference is None else reference.count,
        neighbours=judges.neighbours,
        splits=judges.splits,
        command=command,
        **_machine(dense),
    )
    return Evaluation(
        rows=mark_best(rows, metrics),
        metrics=metrics,
        best_by=best_by,
        setting=setting,
        notes=_notes(num_images, reference, draws_video(dense)),
        images={key: torch.cat(run.kept) for key, run in runs.items()},
    )


def _check(
    dense: DiffusionPipeline,
    pruned: DiffusionPipeline,
    judges: Judges,
    prompts: Sequence[str] | None,
    num_images: int,
    scales: tuple[float | None, ...],
    batch_size: int,
) -> None:
    """Refuse what cannot be compared."""
    if type(dense) is not type(pruned):
        raise ValueError(
            f"compare: dense and pruned must be pipelines of one kind, got {type(dense).__name__} "
            f"and {type(pruned).__name__}."
        )
    kind, name = find_condition(type(dense).__call__), type(dense).__name__
    if kind is None:
        raise ValueError(f"compare: dense must be class-conditional or asked in words, got {name}.")
    if kind == "prompt" and not prompts:
        raise ValueError(
            f"compare: prompts must be given for {name}, which is asked in words, got none. "
            "Give a file with one in a line: --prompts FILE."
        )
    if kind != "prompt" and prompts is not None:
        raise ValueError(
            f"compare: prompts must be left out for {name}, which takes no text, got "
            f"{len(prompts)}. Labels run through all classes."
        )
    if kind != "prompt" and judges.prompt_scores:
        found = ", ".join(score.metric.title for score in judges.prompt_scores)
        raise ValueError(f"compare: {found} must be left out for {name}, which takes no text.")
    if not scales or len(set(scales)) < len(scales):
        raise ValueError(
            f"compare: guidance_scales must be at least one, each once, got {list(scales)}."
        )
    if batch_size < 1:
        raise ValueError(f"compare: batch_size must be at least 1, got {batch_size}.")
    if num_images < judges.least_images():
        raise ValueError(
            f"compare: num_images must be at least {judges.least_images()}, got {num_images}: "
            f"precision and recall look at {judges.neighbours} neighbours of each picture, the "
            f"Inception score at {judges.splits} parts."
        )


def _rehearse(
    kinds: Mapping[str, DiffusionPipeline],
    judges: Judges,
    conditions: list[Any],
    sample: Callable[..., tuple[torch.Tensor, float]],
    steps: int | None,
    scales: tuple[float | None, ...],
    best_by: str | None,
    reads_labels: bool,
) -> tuple[Reference | None, str | None]:
    """Draw one short batch of each model and judge two of its pictures, before the long run.

    First calls pay for set-up, which is not to be counted; and what a judge cannot take is found
    out here. Returns the reference, and the metric that chooses the best guidance.
    """
    few = 2 if steps is None else min(2, steps)
    extremes = dict.fromkeys((scales[0], max(scales, key=lambda s: s or 0.0)))
    for scale in extremes:
        made = {
            model: sample(pipe, conditions, steps=few, guidance_scale=scale)[0]
            for model, pipe in kinds.items()
        }
    if made[DENSE].shape != made[PRUNED].shape:
        raise ValueError(
            "compare: dense and pruned must draw pictures of one shape, got "
            f"{tuple(made[DENSE].shape[1:])} and {tuple(made[PRUNED].shape[1:])}."
        )
    known, reference = [], None
    if judges.reference is not None and judges.network is not None:
        channels, height, width = made[DENSE].shape[-3:]
        reference = judges.reference((channels, height, width))
        _check_reference(reference, judges)
        seen = judges.network(made[DENSE].reshape(-1, channels, height, width)[:1])
        if seen.values.shape[1] != len(reference.moments.mean):
            raise ValueError(
                f"compare: reference must be of the {seen.values.shape[1]} features of "
                f"{judges.network.name}, got {len(reference.moments.mean)} in {reference.name}."
            )
        known = ["frechet"]
        known += [] if reference.features is None else ["precision", "recall"]
        known += [] if seen.probabilities is None else ["inception_score"]
        known += ["accuracy"] if reads_labels else []
    Tally(judges).add(made[PRUNED][:2], conditions[:2], made[DENSE][:2])
    scores = [score.metric.name for score in judges.prompt_scores]
    return reference, _chooser(best_by, known[:1] + scores + known[1:])


def _check_reference(reference: Reference, judges: Judges) -> None:
    if reference.count is not None and reference.count <= judges.neighbours:
        raise ValueError(
            f"compare: reference must have more than {judges.neighbours} pictures, got "
            f"{reference.count} in {reference.name}."
        )


def _chooser(best_by: str | None, known: list[str]) -> str | None:
    if best_by is None:
        return known[0] if known else None
    if best_by not in known:
        names = ", ".join(known) if known else "left out without a feature network or a score"
        raise ValueError(
            f"compare: best_by must be {names}, got {best_by!r}. It has to be measured of the "
            "dense model too."
        )
    return best_by


def _row(
    model: str,
    scale: float | None,
    run: _Run,
    size: tuple[int, int],
    num_images: int,
    reference: Reference | None,
) -> Row:
    counted = [calls.macs() for calls in run.calls]
    return Row(
        model=model,
        guidance_scale=scale,
        parameters=size[0],
        bytes=size[1],
        passes_per_image=sum(calls.samples for calls in run.calls) / num_images,
        macs_per_image=sum(linear for linear, _ in counted) / num_images,
        macs_with_attention_per_image=sum(total for _, total in counted) / num_images,
        seconds_per_image=statistics.median(run.seconds),
        metrics=run.tally.metrics(reference),
    )


def _names(dense: DiffusionPipeline, pruned: DiffusionPipeline) -> dict[str, str]:
    name = source_name(pruned)
    if name is not None and name == source_name(dense):
        name = f"{name}, pruned in memory"
    unknown = "a pipeline in memory"
    return {DENSE: source_name(dense) or unknown, PRUNED: name or unknown}


def _machine(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return device, type and versions of a run."""
    from .. import __version__

    parameter = leading_parameter(find_denoiser(pipe)[1])
    on_gpu = parameter.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(parameter.device) if on_gpu else parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {
            "mosaicdiff": __version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _notes(num_images: int, reference: Reference | None, video: bool) -> tuple[str, ...]:
    """Say what has to be known to read the figures."""
    notes = []
    if reference is not None:
        width = len(reference.moments.mean)
        notes.append(
            f"The Frechet distance of {num_images} pictures is biased upwards, the more the fewer "
            "they are: compare it only with others of as many."
        )
        if num_images <= _FEW * width:
            notes.append(
                f"{num_images} pictures are few for {width} features: differences of the distance "
                "are rough."
            )
        if reference.features is None:
            notes.append(
                f"Precision and recall are left out: {reference.name} holds statistics only."
            )
    if video:
        notes.append("Of videos, every frame counts as a picture.")
    return tuple(notes)
