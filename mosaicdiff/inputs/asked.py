"""What a request hands over as prompts and calibration, read and checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters import Adapter
from ..allocation.planning import Frame
from ..config import PruneConfig
from ..groups import Denoiser, leading_parameter
from ..sources import class_count
from ..statistics.noising import Batch, CalibrationSet
from ..statistics.prompts import (
    Prompts,
    PromptSource,
    call_options,
    condition_argument,
    read_prompts,
)
from ..trajectory.weights import step_weights
from .batching import fitting_rows
from .load import load_calibration

#: What clean latents may be handed over as.
CalibrationSource = str | Path | Iterable[Batch] | None


@dataclass(frozen=True)
class Asked:
    """Prompts of a request.

    Args:
        sampled: that the pipeline is sampled with, where its own trajectories are seen.
        captions: of clean images or latents that say none themselves.
        config: how the pipeline is called.
        cache: whether what is encoded is kept on disk.
    """

    sampled: Prompts | None
    captions: Prompts | None
    config: PruneConfig
    cache: bool


def read_asked(
    prompts: PromptSource,
    pipeline: Any,
    config: PruneConfig,
    calibration: CalibrationSource,
    measured: bool,
    cache: bool,
) -> Asked:
    """Read the prompts of a request, and try the settings of the pipeline's run.

    Args:
        pipeline: None of a bare denoiser.
        measured: whether a kept calibration says what was sampled.

    Raises:
        ValueError: they do not fit the pipeline, or nothing reads them.
    """
    if config.activations == "noised":
        captions = _read_captions(prompts, pipeline, calibration)
        _check_encoding(config, pipeline, calibration, captions)
        return Asked(None, captions, config, cache)
    return Asked(_read_prompts(prompts, pipeline, config, measured), None, config, cache)


def _read_prompts(
    prompts: PromptSource,
    pipeline: Any,
    config: PruneConfig,
    optional: bool,
) -> Prompts | None:
    """Read what to sample with, and try the settings of the run."""
    if pipeline is None:
        raise ValueError(
            "prune: model must be a pipeline with activations='trajectory', got a bare denoiser: "
            "its pipeline is run. Give the pipeline, or use activations='noised' with clean "
            "latents."
        )
    trajectory = config.trajectory
    step_weights(trajectory.weights, config.steps, trajectory.weight_range)
    call = type(pipeline).__call__
    call_options(call, trajectory)
    argument = condition_argument(call)
    if argument == "prompt" and prompts is None and optional:
        return None
    by_class = argument == "class_labels"
    return read_prompts(
        prompts,
        argument,
        classes=class_count(pipeline) if by_class else 0,
        names=getattr(pipeline, "labels", None),
        samples=trajectory.samples,
        seed=config.seed,
    )


def _read_captions(
    prompts: PromptSource,
    pipeline: Any,
    calibration: CalibrationSource,
) -> Prompts | None:
    """Read prompts that are captions of clean images or latents."""
    if prompts is None:
        return None
    if pipeline is None or not isinstance(calibration, (str, Path)):
        raise ValueError(
            "prune: prompts must be left out with activations='noised' and no images or latents "
            f"in files, whose captions they are, got {str(prompts):.60}. Name those "
            "(--calibration FOLDER), or ask for activations='trajectory' (--activations "
            "trajectory)."
        )
    if condition_argument(type(pipeline).__call__) != "prompt":
        raise ValueError(
            "prune: prompts must be left out with activations='noised' for a class-conditional "
            f"pipeline, whose sources hold labels, got {str(prompts):.60}. Ask for "
            "activations='trajectory' (--activations trajectory)."
        )
    return read_prompts(prompts, "prompt")


def _check_encoding(
    config: PruneConfig,
    pipeline: Any,
    calibration: CalibrationSource,
    captions: Prompts | None,
) -> None:
    """Refuse settings of the pipeline's call where nothing is encoded by it."""
    trajectory = config.trajectory
    if trajectory.guidance_scale is None and not trajectory.options:
        return
    folder = isinstance(calibration, (str, Path)) and Path(calibration).is_dir()
    if pipeline is None or not (captions is not None or folder):
        raise ValueError(
            "prune: trajectory must be left out with activations='noised' where no texts are "
            f"encoded, got {trajectory.to_dict(config.steps)}. Give images with captions, or ask "
            "for activations='trajectory' (--activations trajectory)."
        )
    call_options(type(pipeline).__call__, trajectory)


def read_data(
    calibration: CalibrationSource,
    pipeline: Any,
    adapter: Adapter,
    denoiser: Denoiser,
    asked: Asked,
) -> CalibrationSet:
    """Read clean latents with their conditions, and hold them to the denoiser.

    Raises:
        ValueError: they are missing, cannot be read, or do not fit.
    """
    sized = False
    if calibration is None or isinstance(calibration, (str, Path)):
        if pipeline is None:
            raise ValueError(
                "prune: calibration must be batches of (latents, inputs) with a bare denoiser, "
                f"got {calibration!r}."
            )
        options = call_options(type(pipeline).__call__, asked.config.trajectory)
        sized = bool({"height", "width", "num_frames"} & set(options))
        captions = asked.captions
        calibration = load_calibration(
            calibration,
            pipeline,
            prompts=None if captions is None else [str(value) for value in captions.values],
            options=options,
            steps=asked.config.steps,
            cache=asked.cache,
            null=asked.config.activations == "noised" and asked.config.null_share > 0,
        )
    return CalibrationSet(calibration, adapter, denoiser, drawn=sized)


def with_batch(
    config: PruneConfig,
    adapter: Adapter,
    denoiser: Denoiser,
    frame: Frame,
    data: CalibrationSet | None,
) -> PruneConfig:
    """Choose how many samples go through the denoiser at once, where that is asked for.

    Args:
        data: clean latents that are tried; ones of the denoiser's own size where there are none.
    """
    if config.batch_size != "auto":
        return config
    parameter = leading_parameter(denoiser)
    middle = torch.from_numpy(frame.schedule.timesteps)[len(frame.schedule.timesteps) // 2]

    def call(rows: int) -> None:
        if data is None:
            latents = torch.zeros(rows, *adapter.latent_shape(denoiser))
            inputs = adapter.example_inputs(denoiser, rows, parameter.device)
        else:
            latents, inputs = data.take(torch.arange(rows) % len(data))
            inputs = adapter.null_inputs(denoiser, inputs, torch.zeros(rows, dtype=torch.bool))
        inputs = {name: value.to(parameter.device) for name, value in inputs.items()}
        timesteps = middle.expand(rows).to(parameter.device)
        with torch.no_grad():
            adapter.predict(
                denoiser, latents.to(parameter.device, parameter.dtype), timesteps, inputs
            )

    return replace(config, batch_size=fitting_rows(call, parameter.device, denoiser))
