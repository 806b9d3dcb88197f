"""Parallel blocks of one stream, whose output linear reads heads and neurons side by side."""

from __future__ import annotations

from typing import Any

import torch

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
