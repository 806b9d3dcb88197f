"""Where models and calibration latents come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from . import digits
from .adapters import Adapter, adapter_for_class
from .groups import Denoiser
from .inputs.batching import halving
from .inputs.captioned import TextInputs, conditions_for, encode_captioned
from .inputs.captions import IMAGES, Captioned, image_files, read_captions
from .inputs.encoding import batch_rows, encode_pixels
from .inputs.images import read_image
from .inputs.latent_files import LATENTS, latent_files, read_latents
from .runtime import StagedDenoiser
from .single_file import load_single_file_pipeline
from .statistics.noising import Batch
from .statistics.prompts import find_condition
from .trajectory.span import Span

#: Name of the embedded model, wherever a model is asked for.
DIGITS = "digits"

_SECOND = "transformer_2"
_COMPONENTS = ("transformer", "unet", _SECOND)
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


def load_calibration(
    source: str | Path | None,
    pipe: DiffusionPipeline,
    *,
    prompts: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    steps: int = 2,
    cache: bool = True,
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

    Raises:
        ValueError: the source is missing, of another kind, or holds nothing.
    """
    adapter = adapter_for_class(_denoiser_class(pipe))
    names = [c.file_name for c in adapter.conditions if c.needed(find_denoiser(pipe)[1])]
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
    how = TextInputs(pipe, _denoisers(pipe), adapter, dict(options or {}), steps, cache)
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


def _denoisers(pipe: DiffusionPipeline) -> list[nn.Module]:
    """Return all modules of a pipeline that it may call as its denoiser."""
    names = (*_COMPONENTS, *(f"{name}_2" for name in _COMPONENTS))
    found = (getattr(pipe, name, None) for name in names)
    return [module for module in found if isinstance(module, nn.Module)]


def _denoiser_class(pipe: DiffusionPipeline) -> str:
    _, denoiser = find_denoiser(pipe)
    if isinstance(denoiser, StagedDenoiser):
        return denoiser.info.base_class
    return type(denoiser).__name__


def _encode(pipe: DiffusionPipeline, images: torch.Tensor, labels: torch.Tensor) -> Iterator[Batch]:
    """Encode images (N, C, H, W) in [-1, 1] into the latents that the denoiser sees."""
    count = batch_rows(1, *images.shape[2:])
    for chunk, rows in zip(images.split(count), labels.split(count), strict=True):
        parts = halving(lambda part: encode_pixels(pipe, part), chunk, count)
        yield torch.cat(list(parts)), {"class_labels": rows}


def _encode_folder(pipe: DiffusionPipeline, folder: Path) -> Iterator[Batch]:
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


def _native_size(pipe: DiffusionPipeline) -> int:
    _, denoiser = find_denoiser(pipe)
    return denoiser.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
