"""Sample a class-conditional pipeline so that runs can be compared picture by picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline

#: Seeds of successive runs are this far apart, so that no two runs share a picture's noise.
_STRIDE = 1 << 20


def image_generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """Make one generator a picture: its noise depends on its number, not on the batch size."""
    return [torch.Generator().manual_seed(seed * _STRIDE + first + i) for i in range(count)]


def balanced_labels(count: int, classes: int) -> list[int]:
    """Return `count` labels that run through the classes in turn."""
    return [i % classes for i in range(count)]


def sample_images(
    pipe: DiffusionPipeline,
    labels: Sequence[int],
    *,
    steps: int = 50,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda images: None,
) -> tuple[torch.Tensor, float]:
    """Sample one picture a label.

    Returns:
        Images (N, C, H, W) in [-1, 1], float32 on the CPU, and the seconds that it took.

    Raises:
        ValueError: there are no labels.
    """
    if not labels:
        raise ValueError("sample_images: labels must name at least one picture, got none.")
    images, seconds = [], 0.0
    for first in range(0, len(labels), batch_size):
        chunk = list(labels[first : first + batch_size])
        started = time.perf_counter()
        sampled = pipe(
            class_labels=chunk,
            guidance_scale=guidance_scale,
            generator=image_generators(seed, first, len(chunk)),
            num_inference_steps=steps,
            output_type="pt",
        ).images
        images.append(sampled.float().cpu() * 2 - 1)
        seconds += time.perf_counter() - started
        advance(len(chunk))
    return torch.cat(images), seconds
