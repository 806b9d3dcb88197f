"""Where models come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from . import digits
from .groups import Denoiser
from .runtime import StagedDenoiser
from .single_file import load_single_file_pipeline
from .trajectory.span import Span

#: Name of the embedded model, wherever a model is asked for.
DIGITS = "digits"
#: Single files that are no safetensors: refused as such, with the cure.
_PICKLED = (".ckpt", ".pt", ".pth", ".bin")

_SECOND = "transformer_2"
_COMPONENTS = ("transformer", "unet", _SECOND)


def load_pipeline(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    config: str | Path | None = None,
    stage_memory: str = "resident",
) -> DiffusionPipeline:
    """Load `digits`, a local diffusers folder, a Hub id or a single file, dense or staged.

    Args:
        model: which.
        dtype: of the weights.
        device: where they go.
        config: of a single file, folder or Hub id of its pipeline; see
            `load_single_file_pipeline`.
        stage_memory: of a pruned model, as of `StagedDenoiser.set_stage_memory`; with `swap` the
            device never holds all stages, not even while loading.

    Raises:
        ValueError: there is no such model, or the folder holds no pipeline, or `stage_memory` is
            for a model with stages and this has none.
    """
    if stage_memory == "resident":
        return _load(model, dtype, device, config)
    pipe = _load(model, dtype, "cpu", config)
    staged = [c for c in pipe.components.values() if isinstance(c, StagedDenoiser)]
    if not staged:
        raise ValueError(
            f"load_pipeline: stage_memory must be 'resident' for a dense model, got "
            f"{stage_memory!r} for {str(model)!r}. Prune it first."
        )
    for denoiser in staged:
        denoiser.set_stage_memory(stage_memory)
    return pipe.to(device)


def _load(
    model: str | Path, dtype: torch.dtype, device: str | torch.device, config: str | Path | None
) -> DiffusionPipeline:
    path = digits.MODEL_FOLDER if str(model) == DIGITS else Path(model)
    if path.suffix in (".safetensors", *_PICKLED):
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
