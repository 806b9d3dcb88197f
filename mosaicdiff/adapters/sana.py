"""Sana: `SanaTransformer2DModel`, linear attention, convolutions in place of an FFN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..groups import Denoiser, PrunableLayer
from ..pack import StandIn
from .attentions import LEGACY
from .common import image_tokens
from .declared import Family
from .family import Blocks, Neurons
from .inputs import Condition

#: What the pipeline pads a prompt to.
TEXT_TOKENS = 300

#: Of Sana 1.5: norms of queries and keys over all heads together.
_ACROSS = (("norm_q", "to_q"), ("norm_k", "to_k"))


class PixelBias(StandIn):
    """Stand for a gated convolution without channels: its reader's bias at every pixel.

    Exactly what a `GLUMBConv` without its own residual connection and norm would return.
    """

    def __init__(self, channels: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.channels = channels
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def biases(self) -> tuple[torch.Tensor | None, ...]:
        return (self.bias,)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows, _, height, width = hidden_states.shape
        if self.bias is None:
            return hidden_states.new_zeros(rows, self.channels, height, width)
        return self.bias[:, None, None].expand(rows, self.channels, height, width)


class SanaAdapter(Family):
    """Remove heads of linear self-attention and of cross-attention, and channels of GLUMBConv.

    A channel is what a neuron is elsewhere: its two rows before the gate, its depthwise filters
    and its column after. The null condition is the encoding of the empty prompt with its mask.
    """

    denoiser_class = "SanaTransformer2DModel"
    pipelines = ("SanaPipeline",)
    summary = "heads of linear and of cross-attention, and channels of the gated convolutions"
    norms = "none, or across heads (1.5): exact (queries and keys stay whole) or approximate"
    processors = ("SanaLinearAttnProcessor2_0", "SanaAttnProcessor2_0")
    leaves = (
        ("patch_embed*", "patch embedder: its rows are the residual stream"),
        ("time_embed*", "modulation: as wide as the residual stream"),
        ("caption_projection*", "text embedder: its rows are the text stream"),
        ("caption_norm*", "norm of the text stream"),
        ("transformer_blocks.*", "modulation and norms: as wide as the residual stream"),
        ("proj_out*", "output head: its columns are the residual stream"),
        ("", "modulation of the output: as wide as the residual stream"),
    )
    timestep_argument = ("timestep", 2)
    sigma_scale = 1000.0
    conditions = (
        Condition("encoder_hidden_states", ("text", "caption_channels")),
        Condition("encoder_attention_mask", ("text",), optional=True, whole_numbers=True),
    )
    block_kinds = (
        Blocks(
            "transformer_blocks.*",
            (
                LEGACY.self_attention("attn1", across=_ACROSS, linear=True),
                LEGACY.cross_attention("attn2", width="cross_attention_head_dim", across=_ACROSS),
                Neurons("ff", ("conv_inverted", "conv_depth"), "conv_point", "image"),
            ),
        ),
    )

    def check(self, denoiser: Denoiser) -> None:
        config = denoiser.config
        if config.guidance_embeds:
            raise ValueError(
                "prune: guidance_embeds of a SanaTransformer2DModel must be False, got True: "
                "Sana Sprint is sampled by trigonometric flow, which is not supported."
            )
        if config.qk_norm not in (None, "rms_norm_across_heads"):
            raise ValueError(
                "prune: qk_norm of a SanaTransformer2DModel must be None or "
                f"'rms_norm_across_heads', got {config.qk_norm!r}. This kind is not supported."
            )
        super().check(denoiser)

    def tokens(self, denoiser: Denoiser) -> Mapping[str, int]:
        return {"image": image_tokens(denoiser), "text": TEXT_TOKENS}

    def given_timesteps(
        self, denoiser: Denoiser, timesteps: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        return timesteps * denoiser.config.timestep_scale

    def stand_in(
        self, stage: Denoiser, layer: PrunableLayer, biases: Sequence[torch.Tensor | None]
    ) -> nn.Module | None:
        reader: Any = stage.get_submodule(layer.readers[0].module)
        if isinstance(reader, nn.Conv2d):
            return PixelBias(reader.out_channels, biases[0])
        return super().stand_in(stage, layer, biases)
