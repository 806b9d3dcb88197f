"""Make a whole pipeline of a single file."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
)

from ..adapters import adapter_for_class
from ..groups import Denoiser
from .layout import conversion_of
from .load import load_single_file
from .plan import is_pruned, read_header, read_plan

_DENOISERS = ("transformer", "unet")
_VAE = ("first_stage_model.", "vae.")
#: What the names of a file's other components begin with.
_OTHERS = (*_VAE, "cond_stage_model.", "conditioner.", "text_encoders.")


def load_single_file_pipeline(
    path: str | Path,
    config: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **components: Any,
) -> DiffusionPipeline:
    """Load a pipeline from a single file, dense or pruned.

    What the file does not hold (often all but the denoiser) comes from `config`.

    Args:
        path: the `.safetensors`.
        config: folder or Hub id of the pipeline in diffusers' layout: its configurations, and the
            weights that the file lacks. A pruned file may say itself.
        dtype: of the weights.
        device: where they go.
        components: to take as they are, by their names in the pipeline; None leaves one out.

    Raises:
        ValueError: `config` is missing, its denoiser is not the file's, or a component is nowhere.
    """
    file = Path(path)
    names = read_header(file)[0]
    if config is None and is_pruned(file):
        config = read_plan(file)["pipeline"]
    if config is None:
        raise ValueError(
            "load_single_file_pipeline: config must be a folder or a Hub id, got None: a single "
            "file does not hold the configuration of its pipeline. Name one in diffusers' layout "
            "(--pipeline-config), such as stabilityai/stable-diffusion-xl-base-1.0."
        )
    place = str(config)
    try:
        index = DiffusionPipeline.load_config(place)
    except OSError as error:
        raise ValueError(
            f"load_single_file_pipeline: config must be a folder with model_index.json or a Hub "
            f"id, got {place!r}: {error}"
        ) from None
    name, class_name = _denoiser_of(index)
    given = {key: None for key, value in index.items() if value in ([None, None], (None, None))}
    given |= components
    given[name] = _denoiser(file, class_name, place, name, dtype)
    # By its own class: DiffusionPipeline's does not take a transformer that a class calls optional.
    kind = getattr(diffusers, index["_class_name"])
    held = any(other.startswith(_OTHERS) for other in names)
    try:
        if held:
            given |= _lacking(index, given, names, place, dtype)
            made = kind.from_single_file(str(file), config=place, dtype=dtype, **given)
        else:
            made = kind.from_pretrained(place, dtype=dtype, **given)
    except (OSError, SingleFileComponentError) as error:
        raise ValueError(
            f"load_single_file_pipeline: {file} and {place} must hold every component together, "
            f"but one is in neither: {error}"
        ) from None
    made.register_to_config(_name_or_path=str(file))
    made.set_progress_bar_config(disable=True)
    return made.to(device)


def _lacking(
    index: dict[str, Any],
    given: Mapping[str, Any],
    names: Collection[str],
    place: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Load the VAE and the text encoders that a file does not hold; diffusers looks nowhere else.

    Raises:
        OSError: they are not in `place` either.
    """
    found = {}
    for name, value in index.items():
        if name in given or not isinstance(value, (list, tuple)):
            continue
        library, class_name = value
        if name == "vae":
            held = any(other.startswith(_VAE) for other in names)
        elif library == "transformers" and name.startswith("text_encoder"):
            kind = getattr(importlib.import_module(library), class_name)
            held = (
                is_clip_model_in_single_file(kind, dict.fromkeys(names))
                if "CLIP" in class_name
                else is_t5_in_single_file(dict.fromkeys(names))
            )
        else:
            continue
        if not held:
            kind = getattr(importlib.import_module(library), class_name)
            found[name] = kind.from_pretrained(place, subfolder=name, dtype=dtype)
    return found


def _denoiser_of(index: dict[str, Any]) -> tuple[str, str]:
    for name in _DENOISERS:
        value = index.get(name)
        if isinstance(value, (list, tuple)) and value[1] is not None:
            return name, value[1]
    raise ValueError(
        f"load_single_file_pipeline: config must be of a pipeline with one of "
        f"{', '.join(_DENOISERS)}, got {index.get('_class_name')}."
    )


def _denoiser(
    file: Path, class_name: str, config: str, subfolder: str, dtype: torch.dtype
) -> Denoiser:
    if is_pruned(file):
        made_of = read_plan(file)["checkpoint"]["base"]["class"]
        if made_of != class_name:
            raise ValueError(
                f"load_single_file_pipeline: config must be of a pipeline with the file's "
                f"denoiser, {made_of}, got one with {class_name}."
            )
        return load_single_file(file, dtype=dtype)
    adapter_for_class(class_name)
    conversion_of(class_name)
    kind = getattr(diffusers, class_name)
    try:
        model = kind.from_single_file(str(file), config=config, subfolder=subfolder, dtype=dtype)
    except (KeyError, ValueError, RuntimeError, IndexError, SingleFileComponentError) as error:
        raise ValueError(
            f"load_single_file_pipeline: {file} must hold a {class_name} as {config} has it, in "
            "the layout it was published in, but diffusers could not read it so "
            f"({type(error).__name__}: {error}). Name the pipeline it belongs to, or give a folder "
            "in diffusers' layout."
        ) from None
    absent = [key for key, tensor in model.state_dict().items() if tensor.is_meta]
    if absent:
        raise ValueError(
            f"load_single_file_pipeline: {file} must hold {absent[0]} of {class_name} as {config} "
            "has it, but it does not."
        )
    return model
