"""What adapters share: checks of a denoiser's layers, and counts."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..groups import Denoiser, PrunableLayer


def check_plain(denoiser: Denoiser, layers: Iterable[PrunableLayer]) -> None:
    """Refuse layers of other kinds, as a quantiser puts, and head counts that do not fit.

    Raises:
        ValueError: names the module.
    """
    for layer in layers:
        for name in layer.modules:
            kind = type(denoiser.get_submodule(name))
            if not kind.__module__.startswith(("diffusers.", "torch.nn.")):
                raise ValueError(
                    f"prune: {name} must be torch.nn.Linear, got {kind.__name__}. "
                    "Prune before quantising."
                )
        check_fit(denoiser, layer, layer.groups)


def check_fit(stage: Denoiser, layer: PrunableLayer, groups: int) -> None:
    """Hold the attributes of a layer's module to its linears: diffusers derives shapes from both.

    Raises:
        ValueError: they do not fit.
    """
    columns = groups * layer.width
    for writer in layer.writers:
        weight = getattr(stage.get_submodule(writer.module), "weight", None)
        if writer.shared or writer.whole or weight is None:
            continue
        if weight.shape[0] != columns * len(writer.starts):
            raise ValueError(
                f"prune: {layer.name} must have {layer.width} rows a head, got "
                f"{weight.shape[0]} rows of {writer.module.rpartition('.')[2]} for {groups} "
                f"{layer.kind}. Was it pruned by other means?"
            )
    for reader in layer.readers:
        width = stage.get_submodule(reader.module).weight.shape[1]
        if reader.stop is None and width != columns:
            raise ValueError(
                f"prune: {reader.module} must have {columns} columns for {groups} {layer.kind}, "
                f"got {width}. Was it pruned by other means?"
            )
    home = stage.get_submodule(layer.home)
    for name, units in layer.attributes:
        if getattr(home, name) != groups * units:
            raise ValueError(
                f"prune: {layer.home}.{name} must be {groups * units} for {groups} {layer.kind}, "
                f"got {getattr(home, name)}. Was it pruned by other means?"
            )


def image_tokens(denoiser: Denoiser) -> int:
    """Return how many patches an image of the size that the denoiser was made for has."""
    return (denoiser.config.sample_size // denoiser.config.patch_size) ** 2


def check_one_time(timestep: torch.Tensor) -> None:
    """Refuse timesteps (B, T) that differ from token to token.

    Raises:
        ValueError: they do.
    """
    if timestep.ndim > 1 and bool((timestep != timestep[:, :1]).any()):
        raise ValueError(
            "collect: timestep must be the same for all tokens, got several: a pipeline that puts "
            "a clean picture among the noisy frames is not followed."
        )
