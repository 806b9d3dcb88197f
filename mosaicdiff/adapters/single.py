"""What the families of packed latents and parallel blocks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..groups import Denoiser
from ..pack import StandIn


class NoHeads(StandIn):
    """Stand for an attention without heads that leaves its output linear to the block.

    It returns no columns: for what it is given alone, or for it and for the text beside it.
    """

    def biases(self) -> tuple[torch.Tensor | None, ...]:
        return ()

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        image = hidden_states[..., :0]
        if encoder_hidden_states is None:
            return image
        return image, encoder_hidden_states[..., :0]


def check_positions(latents: torch.Tensor, img_ids: torch.Tensor) -> None:
    """Refuse positions that are not those of the latents' tokens.

    Args:
        latents: packed, (B, T, C).
        img_ids: (B, T, axes).

    Raises:
        ValueError: their numbers differ.
    """
    if latents.ndim != 3 or latents.shape[1] != img_ids.shape[1]:
        raise ValueError(
            "calibration: latents must be packed (B, T, C), as the pipeline steps them, with "
            f"img_ids (B, T, axes), got {tuple(latents.shape)} and {tuple(img_ids.shape)}."
        )


def check_channels(denoiser: Denoiser) -> None:
    """Refuse a denoiser that is given more beside the latents, in the same tensor.

    Raises:
        ValueError: it takes other channels than it returns.
    """
    taken, given = denoiser.config.in_channels, denoiser.config.out_channels
    if given is not None and given != taken:
        raise ValueError(
            f"prune: out_channels must be in_channels ({taken}), got {given}. A denoiser that is "
            "given images or masks beside its latents (Fill, Control, image to video) is not "
            "handled: what it is given is not all noised."
        )


def one_grid(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments with positions of tokens as (T, axes); some pipelines repeat them.

    The denoisers read the first row alone.
    """
    found = dict(arguments)
    for name in ("img_ids", "txt_ids"):
        if found.get(name) is not None and found[name].ndim == 3:
            found[name] = found[name][0]
    return found
