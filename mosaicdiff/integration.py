"""Make diffusers' own pipelines know a `StagedDenoiser`. Installed once, on import."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils

from .adapters import DENOISER_CLASSES
from .runtime import StagedDenoiser

_METHODS = ["save_pretrained", "from_pretrained"]


def install() -> None:
    """Register the class for loading, and attach it to the scheduler of whatever pipeline it joins.

    Two tables of diffusers get an entry. `DiffusionPipeline.__setattr__` is wrapped, since every
    way into a pipeline (construction, `from_pipe`, `pipe.scheduler = ...`) passes through it. And
    a pipeline whose signature names a denoiser that can be pruned takes a `StagedDenoiser` too.
    """
    if "mosaicdiff" in pipeline_loading_utils.LOADABLE_CLASSES:
        return
    pipeline_loading_utils.LOADABLE_CLASSES["mosaicdiff"] = {"StagedDenoiser": _METHODS}
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES["StagedDenoiser"] = _METHODS
    original = DiffusionPipeline.__setattr__

    @functools.wraps(original)
    def setattr_and_attach(self: DiffusionPipeline, name: str, value: Any) -> None:
        original(self, name, value)
        if isinstance(value, StagedDenoiser) or _is_scheduler(value):
            attach_components(self)

    DiffusionPipeline.__setattr__ = setattr_and_attach
    _accept_staged_denoisers()


def _accept_staged_denoisers() -> None:
    """Add `StagedDenoiser` to the types that pipelines check their denoiser against."""
    original = DiffusionPipeline._get_signature_types.__func__

    @functools.wraps(original)
    def signature_types(cls: type) -> dict[str, tuple]:
        return {
            name: (*types, StagedDenoiser) if _names_denoiser(types) else types
            for name, types in original(cls).items()
        }

    DiffusionPipeline._get_signature_types = classmethod(signature_types)


def _names_denoiser(types: tuple) -> bool:
    return any(getattr(kind, "__name__", None) in DENOISER_CLASSES for kind in types)


def attach_components(pipe: DiffusionPipeline) -> None:
    """Attach every staged denoiser of a pipeline to its scheduler."""
    scheduler = pipe.__dict__.get("scheduler")
    if scheduler is None:
        return
    for component in list(pipe.__dict__.values()):
        if isinstance(component, StagedDenoiser):
            component.attach(scheduler)


def _is_scheduler(value: Any) -> bool:
    return hasattr(value, "set_timesteps") and hasattr(value, "step")
