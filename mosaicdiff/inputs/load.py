"""Clean latents with their conditions, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import digits
from ..adapters import Adapter, adapter_for_class
from ..runtime import StagedDenoiser
from ..sources import DIGITS, find_denoiser, find_denoisers, source_name
from ..statistics.noising import Batch
from ..statistics.prompts import find_condition
from .batching import halving
from .captioned import TextInputs, conditions_for, encode_captioned
from .captions import IMAGES, Captioned, image_files, read_captions
from .encoding import batch_rows, encode_pixels
from .images import read_image
from .latent_files import LATENTS, latent_files, read_latents

#: Images by class that are read together.
_CHUNK = 64


def load_calibration(
    source: str | Path | None,
    pipe: Any,
    *,
    prompts: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    steps: int = 2,
    cache: bool = True,
    null: bool = False,
) -> list[Batch]:
    """Read calibration batches for a pipeline.

    Args:
        source: clean latents, or images that become such:
            - a `.safetensors` (mapped into memory) or `.npz` with `latents` (N, ...), shifted,
              scaled and packed as the denoiser sees them, and what they are conditioned on:
              `labels` (N,) for a class-conditional denoiser, otherwise the denoiser's arguments by
              name, e.g. `encoder_hidden_states`; those of the empty prompt (of one row or N) are
              `negative_...`; or a folder of such files;
            - for a pipeline that takes prompts, a folder of images with captions, in
              `metadata.csv` or `metadata.jsonl` or in a `.txt` file beside each;
            - for a class-conditional one, a folder of images with a sub-folder for each class;
            - None for the embedded model, which has its own.
        prompts: captions of the images, or of the latents, in the order of file names, where the
            folder says none.
        options: of the pipeline's call where it is run to encode texts: `height`, `width`,
            `num_frames`, `guidance_scale` and so on.
        steps: that it is then asked for.
        cache: whether encoded images and captions are kept in the user's cache folder
            (mosaicdiff/inputs in $XDG_CACHE_HOME or ~/.cache), and taken from there.
        null: whether texts that are encoded need a null condition beside.

    Raises:
        ValueError: the source is missing, of another kind, or holds nothing.
    """
    adapter = adapter_for_class(_denoiser_class(pipe))
    denoisers = [component.denoiser for component in find_denoisers(pipe)]
    names = [c.file_name for c in adapter.conditions if c.needed(denoisers[0])]
    by_class = "labels" in names
    if source is None:
        if source_name(pipe) != DIGITS:
            folder = "a sub-folder for each class" if by_class else "captions"
            raise ValueError(
                "calibration: a source must be given for this model, got none. Name a .npz or "
                f".safetensors file with latents and {' and '.join(names)}, or a folder of "
                f"images with {folder}."
            )
        images, labels = digits.load_images()
        return list(_encode(pipe, images, labels))
    path = Path(source)
    files = _latent_files(path)
    if by_class:
        if prompts is not None:
            raise ValueError(
                "calibration: prompts must be left out for a class-conditional pipeline, whose "
                f"sources hold labels, got {len(prompts)}."
            )
        if not files:
            return list(_encode_folder(pipe, path))
    takes_text = find_condition(type(pipe).__call__) == "prompt"
    how = TextInputs(pipe, denoisers, adapter, dict(options or {}), steps, cache, null)
    if files:
        return _read_files(files, adapter, names, prompts, how if takes_text else None)
    if not takes_text:
        raise ValueError(
            f"calibration: {path} must hold .npz or .safetensors files with latents and "
            f"{' and '.join(names)} for {type(pipe).__name__}, which takes no prompts, got none."
        )
    return encode_captioned(_captioned(path, prompts), how)


def _latent_files(path: Path) -> list[Path]:
    """Return the files of latents that a path names; none where it names a folder of images.

    Raises:
        ValueError: it is nothing that is read.
    """
    if path.is_dir():
        files = latent_files(path)
        if files and image_files(path):
            raise ValueError(
                f"calibration: {path} must hold images or latents, got both "
                f"({image_files(path)[0].name} and {files[0].name}). Part them."
            )
        return files
    if not path.is_file():
        raise ValueError(f"calibration: {path} must be a folder or a file, but there is none.")
    if path.suffix not in LATENTS:
        raise ValueError(f"calibration: {path} must be a folder, a .npz or a .safetensors file.")
    return [path]


def _captioned(folder: Path, prompts: Sequence[str] | None) -> list[Captioned]:
    """List images with captions: the folder's own, or the prompts."""
    pairs = read_captions(folder)
    own = pairs[0].caption is not None
    if own and prompts is not None:
        raise ValueError(
            f"calibration: prompts must be left out where the images have captions, as in "
            f"{folder}, got {len(prompts)}. Move the captions away, or the prompts."
        )
    if own:
        return pairs
    if prompts is None:
        raise ValueError(
            f"calibration: images in {folder} must have captions, got none: images alone do not "
            "say what they are conditioned on. Write a .txt beside each, or metadata.csv "
            "(file_name,text), or give them as prompts (--prompts), in the order of file names."
        )
    _check_count(len(pairs), "images", folder, prompts)
    return [Captioned(pair.path, text) for pair, text in zip(pairs, prompts, strict=True)]


def _check_count(count: int, what: str, place: Path, prompts: Sequence[str]) -> None:
    if count != len(prompts):
        raise ValueError(
            f"calibration: prompts must be as many as {what} in {place}, {count}, got "
            f"{len(prompts)}. They belong to each other in the order of file names."
        )


def _read_files(
    files: Sequence[Path],
    adapter: Adapter,
    names: Sequence[str],
    prompts: Sequence[str] | None,
    how: TextInputs | None,
) -> list[Batch]:
    """Read files of latents; prompts give the conditions where the files hold none."""
    if how is None and prompts is not None:
        raise ValueError(
            "calibration: prompts must be left out for a pipeline that takes none, got "
            f"{len(prompts)}."
        )
    batches = [read_latents(path, adapter, names, texts=prompts is not None) for path in files]
    if prompts is None or how is None:
        return batches
    total = sum(len(latents) for latents, _ in batches)
    _check_count(total, "latents", files[0] if len(files) == 1 else files[0].parent, prompts)
    given = conditions_for(prompts, how)
    ends = torch.tensor([len(latents) for latents, _ in batches]).cumsum(0).tolist()
    return [
        (latents, {name: value[end - len(latents) : end] for name, value in given.items()})
        for (latents, _), end in zip(batches, ends, strict=True)
    ]


def _denoiser_class(pipe: Any) -> str:
    _, denoiser = find_denoiser(pipe)
    if isinstance(denoiser, StagedDenoiser):
        return denoiser.info.base_class
    return type(denoiser).__name__


def _encode(pipe: Any, images: torch.Tensor, labels: torch.Tensor) -> Iterator[Batch]:
    """Encode images (N, C, H, W) in [-1, 1] into the latents that the denoiser sees."""
    count = batch_rows(1, *images.shape[2:])
    for chunk, rows in zip(images.split(count), labels.split(count), strict=True):
        parts = halving(lambda part: encode_pixels(pipe, part), chunk, count)
        yield torch.cat(list(parts)), {"class_labels": rows}


def _encode_folder(pipe: Any, folder: Path) -> Iterator[Batch]:
    size = _native_size(pipe)
    files = [
        (path, label)
        for sub in sorted(p for p in folder.iterdir() if p.is_dir())
        for label in [_class_label(pipe, sub)]
        for path in sorted(sub.iterdir())
        if path.suffix.lower() in IMAGES
    ]
    if not files:
        raise ValueError(
            f"calibration: {folder} must hold a sub-folder of images for each class, "
            "but no image was found in one."
        )
    for start in range(0, len(files), _CHUNK):
        part = files[start : start + _CHUNK]
        channels = pipe.vae.config.in_channels
        images = torch.stack([read_image(path, channels, size, size) for path, _ in part])
        yield from _encode(pipe, images, torch.tensor([label for _, label in part]))


def _class_label(pipe: Any, folder: Path) -> int:
    """Read a sub-folder's name as a label number, or as a name that the pipeline knows."""
    if folder.name.isdecimal():
        return int(folder.name)
    known = getattr(pipe, "labels", None) or {}
    if folder.name in known:
        return int(known[folder.name])
    raise ValueError(
        f"calibration: {folder} must be named by a label number or a class name of the "
        f"pipeline, got {folder.name!r}."
    )


def _native_size(pipe: Any) -> int:
    _, denoiser = find_denoiser(pipe)
    return denoiser.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
