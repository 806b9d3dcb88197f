"""Images with captions, and texts for latents, as calibration batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter
from ..adapters.inputs import NEGATIVE
from ..distributed import World
from .batching import halving
from .cache import Batch, cache_folder, cache_key, read_cache, write_cache
from .captions import Captioned
from .encoding import batch_rows, encode_pixels
from .images import check_images, read_image, read_video
from .recorder import Recorded, record_conditions
from .resting import encoders_at_rest


@dataclass(frozen=True)
class TextInputs:
    """How texts are encoded.

    Args:
        pipe: that takes a prompt.
        denoisers: its modules that are called.
        adapter: of those.
        options: of the pipeline's call: size, frames, guidance, lengths.
        steps: that are asked for.
        cache: whether what is encoded is kept in the user's cache folder, and taken from there.
        null: whether a null condition is needed.
    """

    pipe: Any
    denoisers: Sequence[nn.Module]
    adapter: Adapter
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 2
    cache: bool = True
    null: bool = False

    def record(self, texts: Sequence[str]) -> Recorded:
        """Encode distinct texts; see `record_conditions`.

        Raises:
            ValueError: a null condition is needed, but the pipeline is called without guidance.
        """
        recorded = record_conditions(
            self.pipe, self.denoisers, self.adapter, texts, self.options, self.steps
        )
        if self.null and not any(name.startswith(NEGATIVE) for name in recorded.inputs):
            raise ValueError(
                f"calibration: null_share must be 0 where {type(self.pipe).__name__} is called "
                "without a null condition, as it is by these options. Set null_share=0 "
                "(--null-share 0), or turn its guidance on (--guidance-scale, or for distilled "
                "models --pipeline-option true_cfg_scale=... with a negative_prompt)."
            )
        return recorded


def encode_captioned(pairs: Sequence[Captioned], how: TextInputs) -> list[Batch]:
    """Encode images and captions into latents with conditions.

    Captions are encoded first, each once, by running the pipeline up to its first step; then the
    images at the size that the pipeline prepared its latents for. For a pipeline that draws
    videos, images are videos of one frame, unless the options name more frames (`num_frames`):
    then files that move (GIF, WebP, APNG) give their first ones.

    Returns:
        Batches, mapped from the cache, or in memory without one.

    Raises:
        ValueError: an image cannot be read, or the options do not fit the pipeline.
    """
    paths = [pair.path for pair in pairs]
    captions = [pair.caption or "" for pair in pairs]
    check_images(paths)
    options = dict(how.options)
    if "num_frames" in inspect.signature(type(how.pipe).__call__).parameters:
        options.setdefault("num_frames", 1)
    how = replace(how, options=options)
    if not how.cache:
        return list(_encoded(paths, captions, how))
    key = cache_key(how.pipe, paths, captions, options)
    found = read_cache(cache_folder(), key)
    if found is not None:
        return found
    if not World.current().is_first:  # one process writes
        return list(_encoded(paths, captions, how))
    return write_cache(cache_folder(), key, _encoded(paths, captions, how))


def conditions_for(texts: Sequence[str], how: TextInputs) -> dict[str, torch.Tensor]:
    """Encode texts, each distinct one once, and return the conditions, a row for each."""
    distinct = list(dict.fromkeys(texts))
    return _rows_of(how.record(distinct), distinct, texts)


def _encoded(paths: Sequence[Path], captions: Sequence[str], how: TextInputs) -> Iterator[Batch]:
    distinct = list(dict.fromkeys(captions))
    recorded = how.record(distinct)
    size = recorded.size
    frames, height, width = size.get("num_frames", 1), size["height"], size["width"]
    count = batch_rows(frames, height, width)
    with encoders_at_rest(how.pipe):
        for start in range(0, len(paths), count):
            pixels = [_pixels(how.pipe, path, size) for path in paths[start : start + count]]
            parts = halving(lambda rows: encode_pixels(how.pipe, rows), torch.stack(pixels), count)
            latents = torch.cat(list(parts))
            _check_shape(tuple(latents.shape[1:]), recorded)
            yield latents, _rows_of(recorded, distinct, captions[start : start + count])


def _check_shape(found: tuple[int, ...], recorded: Recorded) -> None:
    if found != recorded.latent_shape:
        asked = " x ".join(str(size) for size in recorded.size.values())
        raise ValueError(
            "calibration: images must give latents as the pipeline prepares them, "
            f"{recorded.latent_shape} for {asked}, got {found}. Choose a size that its VAE and "
            "patches divide, or give latents in files."
        )


def _pixels(pipe: Any, path: Path, size: Mapping[str, int]) -> torch.Tensor:
    """Read a file at the pipeline's size: (C, H, W), or (C, F, H, W) for a VAE of videos."""
    channels = pipe.vae.config.get("in_channels", 3)
    height, width = size["height"], size["width"]
    if not takes_frames(pipe.vae):
        return read_image(path, channels, height, width)
    return read_video(path, channels, height, width, size.get("num_frames", 1))


def takes_frames(vae: nn.Module) -> bool:
    """Tell whether a VAE encodes (B, C, F, H, W): its convolutions are over three axes."""
    return any(isinstance(module, nn.Conv3d) for module in vae.modules())


def _rows_of(
    recorded: Recorded, distinct: Sequence[str], texts: Sequence[str]
) -> dict[str, torch.Tensor]:
    place = {text: number for number, text in enumerate(distinct)}
    rows = torch.tensor([place[text] for text in texts])
    return {
        name: value.expand(len(rows), *value.shape[1:])
        if name.startswith(NEGATIVE) and len(value) == 1
        else value[rows]
        for name, value in recorded.inputs.items()
    }
