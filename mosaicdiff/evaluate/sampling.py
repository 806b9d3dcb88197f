"""Sample a pipeline so that runs can be compared picture by picture."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..batch_errors import in_batch
from ..statistics.prompts import call_options, find_condition
from ..trajectory_config import TrajectoryConfig

#: Seeds of successive runs are this far apart, so that no two runs share a picture's noise.
_STRIDE = 1 << 20


def image_generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """Make one generator a picture: its noise depends on its number, not on the batch size."""
    return [torch.Generator().manual_seed(seed * _STRIDE + first + i) for i in range(count)]


def balanced_labels(count: int, classes: int) -> list[int]:
    """Return `count` labels that run through the classes in turn."""
    return [i % classes for i in range(count)]


def draws_video(pipe: DiffusionPipeline) -> bool:
    """Tell whether a pipeline is asked for frames."""
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters


def sample_images(
    pipe: DiffusionPipeline,
    conditions: Sequence[int] | Sequence[str],
    *,
    steps: int | None = 50,
    guidance_scale: float | None = 1.0,
    seed: int = 0,
    first_image: int = 0,
    batch_size: int = 64,
    options: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> tuple[torch.Tensor, float]:
    """Sample one picture, or video, a label or a prompt.

    Args:
        pipe: class-conditional, or asked in words.
        conditions: labels for the one, prompts for the other.
        steps: None is the pipeline's own default, as of
        guidance_scale: which 1 turns off.
        seed: of the noise.
        first_image: number of the first, of a run that is sampled in parts.
        batch_size: pictures of a call.
        options: other arguments of the pipeline's call, e.g. height and width.
        advance: hears of the pictures of each call.

    Returns:
        Images (N, C, H, W), or videos (N, F, C, H, W), in [-1, 1], float32 on the CPU, and the
        seconds that it took.

    Raises:
        ValueError: there are no conditions, or the pipeline takes none, or not such options.
        Exception: of the pipeline, with the batch's number; see `sample_statistics`.
    """
    if not conditions:
        raise ValueError("sample_images: conditions must name at least one picture, got none.")
    call = type(pipe).__call__
    argument = find_condition(call)
    if argument is None:
        raise ValueError(
            "sample_images: pipe must be class-conditional or asked in words, got "
            f"{type(pipe).__name__}."
        )
    asked = TrajectoryConfig(guidance_scale=guidance_scale, options=options or {})
    given = call_options(call, asked) | {"output_type": "pt"}
    if steps is not None:
        given["num_inference_steps"] = steps
    images, seconds = [], 0.0
    for first in range(0, len(conditions), batch_size):
        chunk = list(conditions[first : first + batch_size])
        started = time.perf_counter()
        generator = image_generators(seed, first_image + first, len(chunk))
        try:
            made = pipe(**{argument: chunk}, generator=generator, **given)
            sampled = made.frames if draws_video(pipe) else made.images
        except Exception as error:
            count = -(-len(conditions) // batch_size)
            raise in_batch(error, "sample_images", first // batch_size, count) from error
        images.append(sampled.float().cpu() * 2 - 1)
        seconds += time.perf_counter() - started
        advance(len(chunk))
    return torch.cat(images), seconds
