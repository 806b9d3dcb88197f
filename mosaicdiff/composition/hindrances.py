"""States of a staged denoiser in which nothing can be added to it, or read from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_CASTING = "layerwise_casting"


def check_plain_weights(staged: Any, caller: str) -> None:
    """Refuse weights that are not there as numbers of 16 or 32 bits.

    Raises:
        ValueError: they are quantised, cast layer by layer, or offloaded.
    """
    for name, module in staged.named_modules():
        hooks = getattr(module.__dict__.get("_diffusers_hook"), "hooks", {})
        if any(_CASTING in hook for hook in hooks):
            raise ValueError(
                f"{caller}: {name} must hold its weights as they are, but layerwise casting has "
                "rounded them. Load the model again, and cast afterwards."
            )
    for name, parameter in staged.named_parameters():
        plain = type(parameter.data) in (nn.Parameter, torch.Tensor)
        if not plain or not parameter.is_floating_point() or parameter.dtype.itemsize == 1:
            raise ValueError(
                f"{caller}: {name} must be of 16 or 32 bits, but it is quantised. Load the model "
                "again, and quantise afterwards."
            )
        if parameter.is_meta:
            raise ValueError(
                f"{caller}: {name} must be in memory, but it is offloaded. Offload afterwards."
            )


def check_resident(staged: Any, caller: str) -> None:
    """Refuse a denoiser whose stages are swapped.

    Raises:
        ValueError: one stage's weights are on the device at a time.
    """
    if staged.stage_memory != "resident":
        raise ValueError(
            f"{caller}: stage_memory must be 'resident', got {staged.stage_memory!r}: swapped "
            "weights are replaced where a stage begins. Call set_stage_memory('resident') first."
        )
