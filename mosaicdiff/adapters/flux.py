"""FLUX.1: `FluxTransformer2DModel`, blocks of two streams and then of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..groups import Denoiser, PrunableLayer
from .declared import Family
from .family import Blocks, Heads, Neurons
from .inputs import Condition
from .joint import joint_stand_in
from .single import NoHeads, check_channels, check_positions, one_grid

#: Tokens of an image of 1024x1024 pixels: 8 pixels a latent, 2x2 latents a token.
IMAGE_TOKENS = 4096
#: Text tokens of `FluxPipeline` by default.
TEXT_TOKENS = 512

#: Integers of diffusers' newer attention modules that never change, as wide as the heads or not.
FLUX_UNTOUCHED = ("head_dim", "query_dim", "out_dim", "added_kv_proj_dim")

_BOTH = "image+text"


class FluxAdapter(Family):
    """Remove heads and neurons of blocks of two streams, and of parallel blocks of one.

    In a parallel block `proj_out` reads heads and neurons side by side.

    Args:
        text_tokens: that costs are counted for.
    """

    denoiser_class = "FluxTransformer2DModel"
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    summary = (
        "heads of joint attention and FFN neurons of both streams; heads and neurons of "
        "parallel blocks"
    )
    norms = "per head: exact"
    processors = ("FluxAttnProcessor",)
    leaves = (
        ("x_embedder*", "patch embedder: its rows are the residual stream"),
        ("context_embedder*", "text embedder: its rows are the residual stream"),
        ("time_text_embed*", "embedder of timestep, guidance and pooled text"),
        ("*transformer_blocks.*.attn.norm_*", "norms over the channels of one head"),
        ("*transformer_blocks.*.norm*", "modulation and norms: as wide as the residual stream"),
        ("norm_out*", "modulation: as wide as the residual stream"),
        ("proj_out*", "output head: its columns are the residual stream"),
    )
    timestep_argument = ("timestep", 3)
    joint = True
    sigma_scale = 1.0
    passes_sigmas = True
    any_size = True
    conditions = (
        Condition("encoder_hidden_states", ("text", "joint_attention_dim")),
        Condition("pooled_projections", ("pooled_projection_dim",)),
        Condition("guidance", when="guidance_embeds", null=False),
        Condition("img_ids", ("image", 3), null=False, per_call=True),
        Condition("txt_ids", ("text", 3), null=False, per_call=True, optional=True),
    )
    block_kinds = (
        Blocks(
            "transformer_blocks.*",
            (
                Heads(
                    "attn",
                    writers=(
                        ("image", ("to_q", "to_k", "to_v")),
                        ("text", ("add_q_proj", "add_k_proj", "add_v_proj")),
                    ),
                    readers=(("image", "to_out.0"), ("text", "to_add_out")),
                    attends=((_BOTH, _BOTH),),
                    untouched=FLUX_UNTOUCHED,
                ),
                Neurons("ff", ("net.0.proj",), "net.2", "image"),
                Neurons("ff_context", ("net.0.proj",), "net.2", "text"),
            ),
        ),
        Blocks(
            "single_transformer_blocks.*",
            (
                Heads(
                    "attn",
                    writers=((_BOTH, ("to_q", "to_k", "to_v")),),
                    readers=((_BOTH, "/proj_out"),),
                    attends=((_BOTH, _BOTH),),
                    untouched=FLUX_UNTOUCHED,
                ),
                Neurons(
                    "mlp", ("proj_mlp",), "proj_out", _BOTH, home_name=".",
                    per_group=("mlp_hidden_dim",),
                ),
            ),
            packed={"proj_out": ("attn", "mlp")},
        ),
    )  # fmt: skip

    def __init__(self, text_tokens: int = TEXT_TOKENS) -> None:
        self.text_tokens = text_tokens

    def check(self, denoiser: Denoiser) -> None:
        check_channels(denoiser)
        super().check(denoiser)

    def tokens(self, denoiser: Denoiser) -> Mapping[str, int]:
        return {"image": IMAGE_TOKENS, "text": self.text_tokens}

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

    def arguments(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        found = super().arguments(denoiser, latents, inputs)
        if "txt_ids" not in found:  # as all its pipelines have it
            found["txt_ids"] = latents.new_zeros(found["encoder_hidden_states"].shape[1], 3)
        return found

    def stand_in(
        self, stage: Denoiser, layer: PrunableLayer, biases: Sequence[torch.Tensor | None]
    ) -> nn.Module | None:
        if layer.kind == "heads":
            single = layer.name.startswith("single_")
            return NoHeads() if single else joint_stand_in(stage, layer, biases)
        return super().stand_in(stage, layer, biases)
