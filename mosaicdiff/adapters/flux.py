"""FLUX.1: `FluxTransformer2DModel`, blocks of two streams and then of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..groups import Denoiser
from .attentions import FLUX
from .family import Blocks, Neurons
from .inputs import Condition
from .single import PackedImages

_BOTH = "image+text"


class FluxAdapter(PackedImages):
    """Remove heads and neurons of blocks of two streams, and of parallel blocks of one.

    In a parallel block `proj_out` reads heads and neurons side by side.
    """

    denoiser_class = "FluxTransformer2DModel"
    pipelines = ("FluxPipeline",)
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
    joint_layers = ("attn",)
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
                FLUX.joint_attention(),
                Neurons("ff", ("net.0.proj",), "net.2", "image"),
                Neurons("ff_context", ("net.0.proj",), "net.2", "text"),
            ),
        ),
        Blocks(
            "single_transformer_blocks.*",
            (
                FLUX.heads(
                    "attn",
                    writers=((_BOTH, ("to_q", "to_k", "to_v")),),
                    readers=((_BOTH, "/proj_out"),),
                    attends=((_BOTH, _BOTH),),
                ),
                Neurons(
                    "mlp", ("proj_mlp",), "proj_out", _BOTH, home_name=".",
                    per_group=("mlp_hidden_dim",),
                ),
            ),
            packed={"proj_out": ("attn", "mlp")},
        ),
    )  # fmt: skip

    def arguments(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        found = super().arguments(denoiser, latents, inputs)
        if "txt_ids" not in found:  # as all its pipelines have it
            found["txt_ids"] = latents.new_zeros(found["encoder_hidden_states"].shape[1], 3)
        return found
