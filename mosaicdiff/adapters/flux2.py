"""FLUX.2: `Flux2Transformer2DModel`, blocks of two streams and then parallel blocks of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..groups import Denoiser
from ..pack import StageBuilder
from .attentions import FLUX
from .family import Blocks, Heads, Neurons
from .inputs import Condition
from .single import PackedImages

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


class Flux2Adapter(PackedImages):
    """Remove heads and neurons of blocks of two streams, and of parallel blocks of one.

    In a parallel block one linear writes queries, keys, values and both halves of the neurons, and
    one reads heads and neurons.
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
    joint_layers = ("attn",)
    sigma_scale = 1.0
    passes_sigmas = True
    empirical_shift = True
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
                FLUX.joint_attention(),
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
                    untouched=(*FLUX.untouched, "mlp_hidden_dim", "mlp_ratio", "mlp_mult_factor"),
                ),
                Neurons(
                    "mlp", ("to_qkv_mlp_proj",), "to_out", _BOTH, home_name="attn",
                    per_group=("mlp_hidden_dim",),
                    untouched=(
                        *FLUX.untouched, "heads", "inner_dim", "mlp_ratio", "mlp_mult_factor",
                    ),
                ),
            ),
            packed={
                "attn.to_qkv_mlp_proj": ("attn", "attn", "attn", "mlp", "mlp"),
                "attn.to_out": ("attn", "mlp"),
            },
        ),
    )  # fmt: skip

    def arguments(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        found = super().arguments(denoiser, latents, inputs)
        if "txt_ids" not in found:  # as its pipelines number them: by place
            count = found["encoder_hidden_states"].shape[1]
            places = torch.arange(count, device=latents.device)
            found["txt_ids"] = torch.cat([places.new_zeros(count, 3), places[:, None]], dim=1)
        return found

    def simplify(self, builder: StageBuilder) -> None:
        for index, block in enumerate(builder.root.single_transformer_blocks):
            if block.attn.heads == 0:
                name = f"single_transformer_blocks.{index}.attn"
                builder.replace(name, NeuronsOnly(block.attn))
