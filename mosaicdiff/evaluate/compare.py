"""Dense beside pruned, in one run, at the same seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..adapters import adapter_for
from ..checkpoint import storage_of
from ..masked_storage import stored_size
from ..runtime import StagedDenoiser
from ..sources import find_denoiser
from .judge import DigitsJudge
from .sampling import balanced_labels, sample_images


@dataclass(frozen=True)
class ModelRow:
    """What was measured of one model.

    MACs are of one image: all steps, guidance counted, attention products included.
    """

    name: str
    parameters: int
    bytes: int
    macs_per_image: float
    seconds_per_image: float
    mse_to_dense: float
    accuracy: float | None = None
    frechet: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Rows of the dense and the pruned model, and their pictures."""

    rows: list[ModelRow]
    num_images: int
    steps: int
    guidance_scale: float
    seed: int
    images: dict[str, torch.Tensor] = field(repr=False)

    @property
    def speedup(self) -> float:
        """Seconds of the dense model over those of the pruned one."""
        return self.rows[0].seconds_per_image / self.rows[1].seconds_per_image

    @property
    def macs_ratio(self) -> float:
        """MACs of the dense model over those of the pruned one."""
        return self.rows[0].macs_per_image / self.rows[1].macs_per_image

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold, without the pictures."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "num_images": self.num_images,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "speedup": self.speedup,
            "macs_ratio": self.macs_ratio,
        }


def compare(
    dense: DiffusionPipeline,
    pruned: DiffusionPipeline,
    *,
    judge: DigitsJudge | None = None,
    classes: int = 10,
    num_images: int = 200,
    steps: int = 50,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 100,
    advance: Callable[[int], None] = lambda images: None,
) -> Comparison:
    """Sample both models with the same noise, batch by batch in turn, and judge them.

    Args:
        judge: gives accuracy and Frechet distance; None leaves them out.
        classes: labels run through 0..classes-1.
        advance: hears of every picture made (twice `num_images` in all).
    """
    labels = balanced_labels(num_images, classes)
    pipes = {"dense": dense, "pruned": pruned}
    images: dict[str, list[torch.Tensor]] = {name: [] for name in pipes}
    seconds = dict.fromkeys(pipes, 0.0)
    for pipe in pipes.values():  # first calls pay for set-up: not counted
        sample_images(pipe, labels[:batch_size], steps=1, guidance_scale=guidance_scale)
    for first in range(0, num_images, batch_size):
        chunk = labels[first : first + batch_size]
        for name, pipe in pipes.items():
            made, spent = sample_images(
                pipe,
                chunk,
                steps=steps,
                guidance_scale=guidance_scale,
                seed=seed + first,
                batch_size=batch_size,
                advance=advance,
            )
            images[name].append(made)
            seconds[name] += spent
    joined = {name: torch.cat(parts) for name, parts in images.items()}
    rows = []
    for name, pipe in pipes.items():
        quality: dict[str, Any] = {}
        if judge is not None:
            quality.update(judge.score(joined[name], torch.tensor(labels)))
        error = (joined[name] - joined["dense"]).double().square().mean()
        rows.append(
            ModelRow(
                name=name,
                seconds_per_image=seconds[name] / num_images,
                mse_to_dense=float(error),
                **model_size(pipe, steps, guidance_scale),
                **quality,
            )
        )
    return Comparison(rows, num_images, steps, guidance_scale, seed, joined)


def model_size(pipe: DiffusionPipeline, steps: int, guidance_scale: float) -> dict[str, Any]:
    """Return parameters and bytes as saved, and MACs of one image, of a pipeline's denoiser."""
    _, denoiser = find_denoiser(pipe)
    calls = steps * (2 if guidance_scale > 1 else 1)
    if isinstance(denoiser, StagedDenoiser):
        macs = denoiser.mean_macs()[1]
    else:
        macs = float(adapter_for(denoiser).macs(denoiser).total)
    parameters, size = denoiser_size(denoiser)
    return {"parameters": parameters, "bytes": size, "macs_per_image": macs * calls}


def denoiser_size(denoiser: nn.Module) -> tuple[int, int]:
    """Return the parameters and bytes that a checkpoint of a denoiser holds."""
    if isinstance(denoiser, StagedDenoiser):
        return stored_size(storage_of(denoiser)[0].items())
    tensors = [parameter.detach() for parameter in denoiser.parameters()]
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)
