"""LTX-Video: `LTXVideoTransformer3DModel`, video in packed latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..groups import Denoiser, PrunableLayer
from ..pack import StageBuilder
from .attentions import LTX
from .common import check_one_time
from .declared import Family
from .family import Blocks, Neurons
from .inputs import Condition

#: What the pipeline pads a prompt to.
TEXT_TOKENS = 128

#: Frames, height and width of the latents of 161 frames of 512x704 pixels, a token each.
_SIZES = (21, 16, 22)

#: What positions are multiplied by at 25 frames a second: 8 frames and 32x32 pixels a latent.
_SCALE = 32.0

_ACROSS = (("norm_q", "to_q"), ("norm_k", "to_k"))


class KeptRotary(nn.Module):
    """Give an attention the rotary embedding of its kept heads.

    LTX turns queries and keys before they are split into heads, by one table over the channels of
    all heads. It is a module, so that the indices move with the model; they are not saved.

    Args:
        processor: that computes the attention.
        columns: channels of the kept heads among those of all heads.
    """

    def __init__(self, processor: Any, columns: torch.Tensor) -> None:
        super().__init__()
        self.processor = processor
        self.columns: torch.Tensor
        self.register_buffer("columns", columns, persistent=False)

    def forward(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if image_rotary_emb is not None:
            cos, sin = (table.index_select(-1, self.columns) for table in image_rotary_emb)
            image_rotary_emb = cos, sin
        return self.processor(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )


class LTXAdapter(Family):
    """Remove heads of self- and of cross-attention and GELU neurons from every block.

    Queries and keys go through norms over all heads together: where those stay exact, their
    projections stay whole. Latents are packed: (B, tokens, channels). The null condition is the
    encoding of the empty prompt with its mask.
    """

    denoiser_class = "LTXVideoTransformer3DModel"
    pipelines = ("LTXPipeline",)
    summary = "heads of self- and cross-attention and FFN neurons of every block"
    norms = "across heads: exact (queries and keys stay whole) or approximate"
    processors = ("LTXVideoAttnProcessor",)
    leaves = (
        ("proj_in*", "patch embedder: its rows are the residual stream"),
        ("time_embed*", "modulation: as wide as the residual stream"),
        ("caption_projection*", "text embedder: its rows are the text stream"),
        ("transformer_blocks.*", "modulation and norms: as wide as the residual stream"),
        ("proj_out*", "output head: its columns are the residual stream"),
        ("", "modulation of the output: as wide as the residual stream"),
    )
    timestep_argument = ("timestep", 2)
    sigma_scale = 1000.0
    passes_sigmas = True
    any_size = True
    conditions = (
        Condition("encoder_hidden_states", ("text", "caption_channels")),
        Condition("encoder_attention_mask", ("text",), whole_numbers=True, example=1),
        *(
            Condition(name, null=False, per_call=True, number=int, whole_numbers=True, example=size)
            for name, size in zip(("num_frames", "height", "width"), _SIZES, strict=True)
        ),
        Condition("rope_interpolation_scale", (3,), null=False, per_call=True, example=_SCALE),
    )
    block_kinds = (
        Blocks(
            "transformer_blocks.*",
            (
                LTX.self_attention("attn1", across=_ACROSS),
                LTX.cross_attention("attn2", across=_ACROSS),
                Neurons("ff", ("net.0.proj",), "net.2", "image"),
            ),
        ),
    )

    def finish(self, builder: StageBuilder, layer: PrunableLayer, kept: torch.Tensor) -> None:
        if layer.kind != "heads":
            return
        home = builder.own(layer.name)
        device = home.to_out[0].weight.device
        columns = layer.columns(kept).to(torch.device("cpu") if device.type == "meta" else device)
        home.processor = KeptRotary(home.processor, columns)

    def check_inputs(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: dict[str, Any]
    ) -> None:
        super().check_inputs(denoiser, latents, inputs)
        sizes = [inputs[name] for name in ("num_frames", "height", "width")]
        tokens = sizes[0] * sizes[1] * sizes[2]
        if bool((tokens != latents.shape[1]).any()):
            raise ValueError(
                "calibration: num_frames * height * width must be the tokens of the latents, "
                f"{latents.shape[1]}, got {sorted(set(tokens.tolist()))}."
            )

    def conditions_of(self, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        check_one_time(arguments["timestep"])
        return super().conditions_of(arguments)

    def tokens(self, denoiser: Denoiser) -> Mapping[str, int]:
        return {"image": self.latent_shape(denoiser)[0], "text": TEXT_TOKENS}

    def latent_shape(self, denoiser: Denoiser) -> tuple[int, ...]:
        frames, height, width = _SIZES
        return frames * height * width, denoiser.config.in_channels
