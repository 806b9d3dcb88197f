"""Qwen-Image: one product for all modulations, rotary embeddings and mask of both streams once."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .fusion import Fusion
from .joint import VECTORS, FinalNorm, JointBlock, clipped
from .joint_attention import FluxAttention, Rotary
from .once import OncePerCall
from .products import Joins, Place
from .shared import shared_modulations


def fuse_qwen(model: Any, joins: Joins) -> Fusion:
    """Return the fused way to run a Qwen-Image or a stage of one."""
    fusion = Fusion()
    blocks = model.transformer_blocks
    if any(block.zero_cond_t for block in blocks):
        raise ValueError(
            "optimize: zero_cond_t must be off, but this model modulates some tokens by another "
            "timestep. Leave it as it is, or pass fuse=False."
        )
    places: list[Place] = [(mod, "1") for b in blocks for mod in (b.img_mod, b.txt_mod)]
    counts = [VECTORS["AdaLayerNormZero"]] * len(places) + [VECTORS["AdaLayerNormContinuous"]]
    modulations = shared_modulations([*places, (model.norm_out, "linear")], counts, joins, fusion)
    turned: OncePerCall = joins.shared(("rotary",), lambda: OncePerCall(_turned))
    masks: OncePerCall = joins.shared(("mask",), lambda: OncePerCall(_joint_mask))
    fusion.once += [turned, masks]
    fusion.forwards.append((model.norm_out, FinalNorm(model.norm_out, modulations).forward))
    attend = functools.partial(FluxAttention, joins=joins, turned=turned)
    for block in blocks:
        norms = [
            (modulations.start(block.img_mod[1]), block.img_norm1, block.img_norm2),
            (modulations.start(block.txt_mod[1]), block.txt_norm1, block.txt_norm2),
        ]
        fused = _Block(block, modulations, fusion, attend, ("img_mlp", "txt_mlp"), norms)
        fused.masks = masks
        fusion.forwards.append((block, fused.forward))
    return fusion


def _turned(image: torch.Tensor, text: torch.Tensor) -> Rotary:
    """Return what turns the text's tokens and then the image's, of complex numbers (T, D / 2)."""
    cos, sin = torch.view_as_real(torch.cat([text, image])).unbind(-1)
    pairs = torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)
    cosines, signs = (pair.flatten(-2)[:, None, None] for pair in pairs)
    return cosines, signs


def _joint_mask(mask: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Return which tokens of text and image are attended to, (B, 1, 1, S + T)."""
    whole = torch.ones(image.shape[:2], dtype=torch.bool, device=mask.device)
    return torch.cat([mask, whole], 1)[:, None, None]


class _Block(JointBlock):
    masks: OncePerCall

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Run as `QwenImageTransformerBlock.forward`."""
        mask = encoder_hidden_states_mask
        if mask is not None:
            mask = self.masks(mask, hidden_states)
        text, image = self.run(
            hidden_states,
            encoder_hidden_states,
            temb,
            attention_mask=mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        return None if text is None else clipped(text), clipped(image)
