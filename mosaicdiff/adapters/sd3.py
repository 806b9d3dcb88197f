"""SD3 and SD3.5: `SD3Transformer2DModel`, text and image attended to together (MMDiT)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch

from ..groups import Denoiser
from ..pack import BiasOnly, StageBuilder
from .attentions import LEGACY
from .common import image_tokens
from .declared import Family
from .family import Blocks, Neurons
from .inputs import Condition
from .joint import JointBiasOnly, JointBiasOnlyBlock, watch_streams

#: Text tokens that costs are counted for: 77 of CLIP and 256 of T5, as `StableDiffusion3Pipeline`
#: joins them by default. What is pruned does not depend on how many there are.
TEXT_TOKENS = 333


class SD3Adapter(Family):
    """Remove heads of joint attention from both streams, heads of dual attention, GELU neurons.

    The null condition is the encodings of the empty prompt, which only the text encoders know:
    where the batches hold them as `negative_...`, `null_share` takes from those; where they do
    not, `null_share` must be 0.
    """

    denoiser_class = "SD3Transformer2DModel"
    pipelines = ("StableDiffusion3Pipeline",)
    summary = "heads of joint and of dual attention, and FFN neurons of both streams"
    norms = "per head (SD3.5): exact"
    processors = ("JointAttnProcessor2_0", "AttnProcessor2_0")
    leaves = (
        ("pos_embed*", "patch embedder: its rows are the residual stream"),
        ("time_text_embed*", "embedder of timestep and pooled text"),
        ("context_embedder*", "text embedder: its rows are the residual stream"),
        ("transformer_blocks.*.norm*", "modulation and norms: as wide as the residual stream"),
        ("transformer_blocks.*.attn*.norm*", "norms over the channels of one head"),
        ("norm_out*", "modulation: as wide as the residual stream"),
        ("proj_out*", "output head: its columns are the residual stream"),
    )
    timestep_argument = ("timestep", 3)
    joint = True
    joint_layers = ("attn",)
    sigma_scale = 1000.0
    watches_blocks = True
    conditions = (
        Condition("encoder_hidden_states", ("text", "joint_attention_dim")),
        Condition("pooled_projections", ("pooled_projection_dim",)),
    )
    block_kinds = (
        Blocks(
            "transformer_blocks.*",
            (
                LEGACY.joint_attention(),
                LEGACY.self_attention("attn2"),
                Neurons("ff", ("net.0.proj",), "net.2", "image"),
                Neurons("ff_context", ("net.0.proj",), "net.2", "text"),
            ),
        ),
    )

    def tokens(self, denoiser: Denoiser) -> Mapping[str, int]:
        return {"image": image_tokens(denoiser), "text": TEXT_TOKENS}

    def simplify(self, builder: StageBuilder) -> None:
        for name, block in zip(
            self.blocks(builder.root), builder.root.transformer_blocks, strict=True
        ):
            rest = [m for m in (block.attn2, block.ff, block.ff_context) if m is not None]
            gone = isinstance(block.attn, JointBiasOnly)
            if gone and all(isinstance(module, BiasOnly) for module in rest):
                builder.replace(name, JointBiasOnlyBlock(block))

    def watch_block(
        self,
        module: Denoiser,
        name: str,
        add: Callable[[str, torch.Tensor, torch.Tensor], None],
    ) -> ExitStack:
        """Report image and text tokens under the same names: they are counted together."""
        return watch_streams(module, name, add)
