"""Where models and calibration latents come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from . import digits
from .adapters import Adapter, adapter_for_class
from .groups import Denoiser
from .runtime import StagedDenoiser
from .single_file import load_single_file_pipeline
from .statistics.noising import Batch
from .trajectory.span import Span

#: Name of the embedded model, wherever a model is asked for.
DIGITS = "digits"

_SECOND = "transformer_2"
_COMPONENTS = ("transformer", "unet", _SECOND)
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_CHUNK = 64


def load_pipeline(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    config: str | Path | None = None,
) -> DiffusionPipeline:
    """Load `digits`, a local diffusers folder, a Hub id or a single file, dense or staged.

    Args:
        model: which.
        dtype: of the weights.
        device: where they go.
        config: of a single file, folder or Hub id of its pipeline; see
            `load_single_file_pipeline`.

    Raises:
        ValueError: there is no such model, or the folder holds no pipeline.
    """
    path = digits.MODEL_FOLDER if str(model) == DIGITS else Path(model)
    if path.suffix == ".safetensors":
        return load_single_file_pipeline(path, config, dtype, device)
    if config is not None:
        raise ValueError(
            f"load_pipeline: config must be left out but for a single file (.safetensors), got "
            f"{str(config)!r} for {str(model)!r}, which has its own."
        )
    if (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"load_pipeline: {path} must be a whole pipeline, but it is a single model. "
            "Load it by its class (StagedDenoiser.from_pretrained for a pruned one), or give the "
            "folder that the pipeline's save_pretrained wrote."
        )
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"load_pipeline: {path} must be a diffusers pipeline folder, but it holds no "
            "model_index.json. Give the folder that the pipeline's save_pretrained wrote."
        )
    name = str(path) if path.exists() else str(model)
    if not path.exists() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise ValueError(
            f"load_pipeline: model must be 'digits', a local folder or a Hub id "
            f"(owner/name), got {name!r}, which is none of them."
        )
    try:
        # What was saved as left out (a text encoder) is left out again: diffusers wants it said.
        index = DiffusionPipeline.load_config(name)
        absent = {
            key: None for key, value in index.items() if value in ([None, None], (None, None))
        }
        pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype, **absent)
    except OSError as error:
        raise ValueError(
            f"load_pipeline: {name!r} could not be loaded as a pipeline: {error}"
        ) from None
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@dataclass(frozen=True)
class Component:
    """A denoiser of a pipeline.

    Args:
        name: of the pipeline's attribute.
        denoiser: the module.
        span: the timesteps that the pipeline calls it at.
    """

    name: str
    denoiser: Denoiser
    span: Span = Span()


def find_denoisers(pipe: DiffusionPipeline) -> tuple[Component, ...]:
    """Return the denoisers of a pipeline, in the order in which it calls them.

    Two are Wan 2.2's: with a `boundary_ratio` in its configuration, `transformer` is called from
    that share of the train timesteps upwards and `transformer_2` below; without, `transformer_2`
    is never called, and left out here. Either may be missing.

    Raises:
        ValueError: the pipeline has none.
    """
    found = [
        (name, module)
        for name in _COMPONENTS
        if isinstance(module := getattr(pipe, name, None), nn.Module)
    ]
    ratio = pipe.config.get("boundary_ratio")
    components = []
    if ratio is None:
        components = [Component(*pair) for pair in found if pair[0] != _SECOND][:1]
    else:
        boundary = float(ratio) * pipe.scheduler.config.num_train_timesteps
        for name, module in found:
            span = Span(below=boundary) if name == _SECOND else Span(at_least=boundary)
            components.append(Component(name, module, span))
    if not components:
        raise ValueError(
            f"find_denoiser: pipeline must have one of {', '.join(_COMPONENTS[:-1])}, got "
            f"{type(pipe).__name__} with {', '.join(pipe.components)}."
        )
    return tuple(components)


def find_component(pipe: DiffusionPipeline, name: str | None = None) -> Component:
    """Return the denoiser of that name, or the first that the pipeline calls.

    Raises:
        ValueError: the pipeline calls none of that name.
    """
    components = find_denoisers(pipe)
    chosen = [c for c in components if name is None or c.name == name]
    if not chosen:
        raise ValueError(
            f"find_denoiser: component must be one of {', '.join(c.name for c in components)}, "
            f"got {name!r}: {type(pipe).__name__} calls no other."
        )
    return chosen[0]


def find_denoiser(pipe: DiffusionPipeline) -> tuple[str, Denoiser]:
    """Return name and module of the (first) denoiser of a pipeline; see `find_denoisers`."""
    component = find_component(pipe)
    return component.name, component.denoiser


def source_name(pipe: DiffusionPipeline | None) -> str | None:
    """Return what a pipeline was loaded from; the embedded model by its name."""
    if pipe is None:
        return None
    origin = getattr(pipe.config, "_name_or_path", None)
    if origin and Path(origin).resolve() == digits.MODEL_FOLDER.resolve():
        return DIGITS
    return origin


def class_count(pipe: DiffusionPipeline) -> int:
    """Return how many classes a class-conditional pipeline was trained on.

    The embedded model has ten, though its table is as long as DiTPipeline's null label demands.

    Raises:
        ValueError: the pipeline knows no classes.
    """
    _, denoiser = find_denoiser(pipe)
    origin = denoiser.info.source if isinstance(denoiser, StagedDenoiser) else source_name(pipe)
    count = getattr(denoiser.config, "num_embeds_ada_norm", None)
    if count is None:
        raise ValueError(
            f"class_count: pipeline must be class-conditional, got {type(pipe).__name__}."
        )
    return digits.CLASSES if origin == DIGITS else count


def load_calibration(source: str | Path | None, pipe: DiffusionPipeline) -> list[Batch]:
    """Read calibration batches for a pipeline.

    Args:
        source: a `.npz` or `.safetensors` with `latents` (N, C, H, W), shifted and scaled as the
            denoiser sees them, and what they are conditioned on: `labels` (N,), or for SD3
            `encoder_hidden_states` and `pooled_projections`, and those of the empty prompt (of
            one row or N) as `negative_...`; for a class-conditional pipeline also a folder of
            images with a sub-folder for each class; or None for the embedded model, which has
            its own.

    Raises:
        ValueError: the source is missing, of another kind, or holds nothing.
    """
    adapter = adapter_for_class(_denoiser_class(pipe))
    names = [c.file_name for c in adapter.conditions if not c.optional]
    by_class = "labels" in names
    folder = ", or a folder of images with a sub-folder for each class"
    if source is None:
        if source_name(pipe) != DIGITS:
            raise ValueError(
                "calibration: a source must be given for this model, got none. Name a .npz or "
                f".safetensors file with latents and {' and '.join(names)}"
                f"{folder if by_class else ''}."
            )
        images, labels = digits.load_images()
        return list(_encode(pipe, images, labels))
    path = Path(source)
    if path.is_dir():
        if not by_class:
            raise ValueError(
                f"calibration: {path} must be a .npz or .safetensors file with latents and "
                f"{' and '.join(names)}, but it is a folder: images alone do not say "
                "what they are conditioned on."
            )
        return list(_encode_folder(pipe, path))
    if not path.is_file():
        raise ValueError(f"calibration: {path} must be a folder or a file, but there is none.")
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"calibration: {path} must be a folder, a .npz or a .safetensors file.")
    return [_latent_file(path, adapter)]


def _denoiser_class(pipe: DiffusionPipeline) -> str:
    _, denoiser = find_denoiser(pipe)
    if isinstance(denoiser, StagedDenoiser):
        return denoiser.info.base_class
    return type(denoiser).__name__


def _latent_file(path: Path, adapter: Adapter) -> Batch:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                held = {key: torch.from_numpy(archive[key]) for key in archive.files}
        else:
            held = load_file(path)
    except Exception as error:
        raise ValueError(f"calibration: {path} could not be read: {error}") from None
    names = ["latents", *(c.file_name for c in adapter.conditions if not c.optional)]
    if not set(names) <= set(held):
        needed = " and ".join(f"{name!r}" for name in names)
        raise ValueError(f"calibration: {path} must hold {needed}, got {sorted(held)}.")
    latents = held["latents"].float()
    inputs = {}
    for condition in adapter.conditions:
        for name, argument in (
            (condition.file_name, condition.name),
            (condition.negative, condition.negative),
        ):
            if name not in held:
                continue
            value = held[name]
            if condition.whole_numbers:
                if value.is_floating_point():
                    raise ValueError(
                        f"calibration: {name} in {path} must be whole numbers, got {value.dtype}."
                    )
                value = value.long()
            if name == condition.negative and len(value) == 1:
                value = value.expand(len(latents), *value.shape[1:])
            inputs[argument] = value
    return latents, inputs


def _encode(pipe: DiffusionPipeline, images: torch.Tensor, labels: torch.Tensor) -> Iterator[Batch]:
    """Encode images (N, C, H, W) in [-1, 1] into the latents that the denoiser sees."""
    vae = pipe.vae
    parameter = next(vae.parameters())
    with torch.no_grad():
        pairs = zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True)
        for chunk, rows in pairs:
            encoded = vae.encode(chunk.to(parameter.device, parameter.dtype)).latent_dist.mode()
            yield (encoded * vae.config.scaling_factor).float().cpu(), {"class_labels": rows}


def _encode_folder(pipe: DiffusionPipeline, folder: Path) -> Iterator[Batch]:
    files = [
        (path, label)
        for sub in sorted(p for p in folder.iterdir() if p.is_dir())
        for label in [_class_label(pipe, sub)]
        for path in sorted(sub.iterdir())
        if path.suffix.lower() in _IMAGES
    ]
    if not files:
        raise ValueError(
            f"calibration: {folder} must hold a sub-folder of images for each class, "
            "but no image was found in one."
        )
    for start in range(0, len(files), _CHUNK):
        part = files[start : start + _CHUNK]
        images = torch.stack([_read_image(pipe, path) for path, _ in part])
        yield from _encode(pipe, images, torch.tensor([label for _, label in part]))


def _class_label(pipe: DiffusionPipeline, folder: Path) -> int:
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


def _read_image(pipe: DiffusionPipeline, path: Path) -> torch.Tensor:
    """Read an image as (C, H, W) in [-1, 1], cropped to the centre at the pipeline's size."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    config = pipe.vae.config
    _, denoiser = find_denoiser(pipe)
    size = denoiser.config.sample_size * 2 ** (len(config.block_out_channels) - 1)
    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(
                image.convert("L" if config.in_channels == 1 else "RGB"),
                (size, size),
                Image.Resampling.BICUBIC,
            )
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"calibration: {path} could not be read as an image: {error}") from None
    pixels: Any = np.asarray(fitted, dtype=np.float32)
    return torch.from_numpy(pixels.reshape(size, size, -1)).permute(2, 0, 1) / 127.5 - 1
