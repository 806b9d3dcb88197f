"""What the families of packed latents share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..groups import Denoiser
from .declared import Family

#: Tokens of an image of 1024x1024 pixels: 8 pixels a latent, 2x2 latents a token.
IMAGE_TOKENS = 4096
#: Text tokens that the pipelines of FLUX pad a prompt to by default.
TEXT_TOKENS = 512


class PackedImages(Family):
    """A family whose latents are tokens (B, T, C) with positions `img_ids`, as FLUX has them."""

    def check(self, denoiser: Denoiser) -> None:
        check_channels(denoiser)
        super().check(denoiser)

    def tokens(self, denoiser: Denoiser) -> Mapping[str, int]:
        return {"image": IMAGE_TOKENS, "text": TEXT_TOKENS}

    def latent_shape(self, denoiser: Denoiser) -> tuple[int, ...]:
        return IMAGE_TOKENS, denoiser.config.in_channels

    def check_inputs(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: dict[str, Any]
    ) -> None:
        super().check_inputs(denoiser, latents, inputs)
        check_positions(latents, inputs["img_ids"])

    def conditions_of(self, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return super().conditions_of(one_grid(arguments))

    def given_timesteps(
        self, denoiser: Denoiser, timesteps: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        return timesteps.to(latents.dtype) / 1000


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
