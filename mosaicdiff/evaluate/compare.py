"""Dense beside pruned, in one run, at the same seeds and guidance, and each at its best."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..groups import leading_parameter
from ..sources import class_count, find_denoiser, find_denoisers, source_name
from .cost import Calls, calls_of, pipeline_size, watched
from .evaluation import DENSE, PRUNED, Evaluation, Row, Setting, mark_best
from .quality import Judges, Tally, known_metrics
from .reference import Reference
from .rehearsal import check_request, rehearse
from .sampling import balanced_labels, draws_video, sample_images
from .state import check_state_file, fingerprint, load_state, save_state

#: Pictures of a row that are kept: so many, while they fit into so many bytes; one at least.
_KEPT, _KEPT_BYTES = 100, 1 << 27
#: Pictures in d features below which the distance is mostly bias, as a multiple of d.
_FEW = 2
#: Batches from which a median of their times means something.
FEW_BATCHES = 5


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
    state: Path | None = None,
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
        state: `.npz` file that holds what was found after every batch, to go on from after the
            process was killed; it goes when all is done.
        advance: hears of every picture made (2 x `num_images` x scales in all).

    Raises:
        ValueError: pipelines of two kinds, too few pictures, a scale twice, or a metric that
            cannot choose; and what the judges refuse, all before the long run.
        Exception: of a pipeline, with the batch's number; see `sample_images`.
    """
    judges = Judges() if judges is None else judges
    scales = tuple(guidance_scales)
    if state is not None:
        check_state_file(state)
    check_request(dense, pruned, judges, prompts, num_images, scales, batch_size)
    conditions: list[Any] = (
        balanced_labels(num_images, class_count(dense))
        if prompts is None
        else [prompts[i % len(prompts)] for i in range(num_images)]
    )
    kinds = {DENSE: dense, PRUNED: pruned}
    known = None if judges.network is None else judges.network.classes
    reads_labels = prompts is None and known == class_count(dense)
    sample = partial(sample_images, seed=seed, batch_size=batch_size, options=options)
    reference, best_by = rehearse(
        kinds, judges, conditions[:batch_size], sample, steps, scales, best_by, reads_labels
    )
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
    runs = {
        (model, scale): _Run(pipe, Tally(judges, reads_labels), calls_of(pipe))
        for scale in scales
        for model, pipe in kinds.items()
    }
    identity = {} if state is None else _identity(setting, judges, kinds)
    done = 0 if state is None else load_state(state, identity, list(runs.values()))
    advance(done * len(runs))
    for first in range(done, num_images, batch_size):
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
        if state is not None and first + batch_size < num_images:
            save_state(state, identity, first + batch_size, list(runs.values()))
    sizes = {model: pipeline_size(pipe) for model, pipe in kinds.items()}
    rows = tuple(
        _row(model, scale, run, sizes[model], num_images, reference)
        for (model, scale), run in runs.items()
    )
    metrics = known_metrics(judges, reference, [dict(row.metrics) for row in rows])
    if state is not None:
        state.unlink(missing_ok=True)
    rows = mark_best(rows, metrics)
    batches = -(-num_images // batch_size)
    notes = _notes(num_images, batches, reference, draws_video(dense))
    return Evaluation(
        rows=rows,
        metrics=metrics,
        best_by=best_by,
        setting=setting,
        notes=notes + _edge_notes(rows, scales, best_by),
        images={key: torch.cat(run.kept) for key, run in runs.items()},
    )


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


def _identity(
    setting: Setting, judges: Judges, kinds: Mapping[str, DiffusionPipeline]
) -> dict[str, Any]:
    """Return all that decides what is found, as JSON holds it."""
    others = [score.metric for score in judges.prompt_scores]
    others += [] if judges.lpips is None else [judges.lpips.metric]
    found = {name: value for name, value in asdict(setting).items() if name != "command"}
    found["scores"] = [asdict(metric) for metric in others]
    found["weights"] = {
        model: fingerprint(component.denoiser for component in find_denoisers(pipe))
        for model, pipe in kinds.items()
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


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


def _edge_notes(
    rows: Sequence[Row], scales: tuple[float | None, ...], best_by: str | None
) -> tuple[str, ...]:
    """Say where the best guidance may lie beyond the sweep."""
    numbers = [scale for scale in scales if scale is not None]
    if len(numbers) < 2:
        return ()
    return tuple(
        f"The {row.model} model is best at guidance {row.guidance_scale:g}, the largest that was "
        "tried: its best may lie beyond."
        for row in rows
        if best_by in row.best_by and row.guidance_scale == max(numbers)
    )


def _notes(
    num_images: int, batches: int, reference: Reference | None, video: bool
) -> tuple[str, ...]:
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
    if batches < FEW_BATCHES:
        notes.append(
            f"Seconds are of {'one batch' if batches == 1 else f'{batches} batches'}, which is "
            "rough: time it by "
            "`mosaicdiff bench`, or take more batches on a machine that does nothing else."
        )
    if video:
        notes.append("Of videos, every frame counts as a picture.")
    return tuple(notes)
