"""FLUX.2: `Flux2Transformer2DModel`, blocks of two streams and then parallel blocks of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..groups import Denoiser, PrunableLayer
from ..pack import StageBuilder
from .declared import Family
from .family import Blocks, Heads, Neurons
from .flux import FLUX_UNTOUCHED
from .inputs import Condition
from .joint import joint_stand_in
from .single import check_channels, check_positions, one_grid

#: Tokens of an image of 1024x1024 pixels: 8 pixels a latent, 2x2 latents a token.
IMAGE_TOKENS = 4096
#: Text tokens of `Flux2Pipeline` by default.
TEXT_TOKENS = 512

_BOTH = "image+text"
_GATED = ("linear_in",)  # the half that goes through the activation first, the gated one second


class NeuronsOnly(nn.Module):
    """Stand for the attention of a parallel block without heads: its neurons alone, if any."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.to_qkv_mlp_proj = attention.to_qkv_mlp_proj
        self.mlp_act_fn = attention.mlp_act_fn
        self.to_out = attention.to_out

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        neurons = self.mlp_act_fn(self.to_qkv_mlp_proj(hidden_states))
        output: torch.Tensor = self.to_out(neurons)
        return output


class Flux2Adapter(Family):
    """Remove heads and neurons of blocks of two streams, and of parallel blocks of one.

    In a parallel block one linear writes queries, keys, values and both halves of the neurons, and
    one reads heads and neurons.

    Args:
        text_tokens: that costs are counted for.
    """

    denoiser_class = "Flux2Transformer2DModel"
    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    summary = (
        "heads of joint attention and SwiGLU neurons of both streams; heads and neurons of "
        "parallel blocks"
    )
    norms = "per head: exact"
    processors = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")
    leaves = (
        ("x_embedder*", "patch embedder: its rows are the residual stream"),
        ("context_embedder*", "text embedder: its rows are the residual stream"),
        ("time_guidance_embed*", "embedder of timestep and guidance"),
        ("*_stream_modulation*", "modulation that all blocks share"),
        ("*transformer_blocks.*.attn.norm_*", "norms over the channels of one head"),
        ("norm_out*", "modulation: as wide as the residual stream"),
        ("proj_out*", "output head: its columns are the residual stream"),
    )
    timestep_argument = ("timestep", 2)
    joint = True
    sigma_scale = 1.0
    passes_sigmas = True
    any_size = True
    conditions = (
        Condition("encoder_hidden_states", ("text", "joint_attention_dim")),
        Condition("guidance", when="guidance_embeds", null=False),
        Condition("img_ids", ("image", 4), null=False, per_call=True, whole_numbers=True),
        Condition(
            "txt_ids", ("text", 4), null=False, per_call=True, whole_numbers=True, optional=True
        ),
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
                Neurons("ff", _GATED, "linear_out", "image"),
                Neurons("ff_context", _GATED, "linear_out", "text"),
            ),
        ),
        Blocks(
            "single_transformer_blocks.*",
            (
                Heads(
                    "attn",
                    writers=((_BOTH, ("to_qkv_mlp_proj",)),),
                    readers=((_BOTH, "to_out"),),
                    attends=((_BOTH, _BOTH),),
                    untouched=(*FLUX_UNTOUCHED, "mlp_hidden_dim", "mlp_ratio", "mlp_mult_factor"),
                ),
                Neurons(
                    "mlp", ("to_qkv_mlp_proj",), "to_out", _BOTH, home_name="attn",
                    per_group=("mlp_hidden_dim",),
                    untouched=(
                        *FLUX_UNTOUCHED, "heads", "inner_dim", "mlp_ratio", "mlp_mult_factor",
                    ),
                ),
            ),
            packed={
                "attn.to_qkv_mlp_proj": ("attn", "attn", "attn", "mlp", "mlp"),
                "attn.to_out": ("attn", "mlp"),
            },
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
        if "txt_ids" not in found:  # as its pipelines number them: by place
            count = found["encoder_hidden_states"].shape[1]
            places = torch.arange(count, device=latents.device)
            found["txt_ids"] = torch.cat([places.new_zeros(count, 3), places[:, None]], dim=1)
        return found

    def stand_in(
        self, stage: Denoiser, layer: PrunableLayer, biases: Sequence[torch.Tensor | None]
    ) -> nn.Module | None:
        if layer.name.startswith("single_"):
            return None  # one module holds heads and neurons: see `simplify`
        if layer.kind == "heads":
            return joint_stand_in(stage, layer, biases)
        return super().stand_in(stage, layer, biases)

    def simplify(self, builder: StageBuilder) -> None:
        for index, block in enumerate(builder.root.single_transformer_blocks):
            if block.attn.heads == 0:
                name = f"single_transformer_blocks.{index}.attn"
                builder.replace(name, NeuronsOnly(block.attn))
