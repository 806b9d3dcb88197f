"""PixArt-alpha and PixArt-sigma: `PixArtTransformer2DModel`, text attended to apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..groups import Denoiser
from .attentions import LEGACY
from .common import image_tokens
from .declared import Family
from .family import Blocks, Neurons
from .inputs import Condition

#: What the two pipelines pad a prompt to. What is pruned does not depend on it.
ALPHA_TEXT_TOKENS, SIGMA_TEXT_TOKENS = 120, 300

#: Only the alpha checkpoints of 1024 pixels are told these.
_MICRO_CONDITIONS = ("resolution", "aspect_ratio")


class PixArtAdapter(Family):
    """Remove heads of self- and of cross-attention and GELU neurons from every block.

    The null condition is the encoding of the empty prompt with its mask: where the batches hold
    it as `negative_...`, `null_share` takes from it.
    """

    denoiser_class = "PixArtTransformer2DModel"
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    summary = "heads of self- and cross-attention and FFN neurons of every block"
    norms = "none"
    processors = ("AttnProcessor", "AttnProcessor2_0")
    leaves = (
        ("pos_embed*", "patch embedder: its rows are the residual stream"),
        ("adaln_single*", "modulation: as wide as the residual stream"),
        ("caption_projection*", "text embedder: its rows are the text stream"),
        ("transformer_blocks.*", "modulation: as wide as the residual stream"),
        ("proj_out*", "output head: its columns are the residual stream"),
        ("", "modulation of the output: as wide as the residual stream"),
    )
    timestep_argument = ("timestep", 2)
    conditions = (
        Condition("encoder_hidden_states", ("text", "caption_channels|cross_attention_dim")),
        Condition("encoder_attention_mask", ("text",), optional=True, whole_numbers=True),
        Condition("added_cond_kwargs.resolution", (2,), optional=True, null=False, example=1024.0),
        Condition("added_cond_kwargs.aspect_ratio", (1,), optional=True, null=False, example=1.0),
    )
    block_kinds = (
        Blocks(
            "transformer_blocks.*",
            (
                LEGACY.self_attention("attn1"),
                LEGACY.cross_attention("attn2"),
                Neurons("ff", ("net.0.proj",), "net.2", "image"),
            ),
        ),
    )

    def conditions_for(self, denoiser: Denoiser) -> tuple[Condition, ...]:
        """Ask for the size of the picture where the model is told it."""
        rest = tuple(c for c in self.conditions if c.name not in _MICRO_CONDITIONS)
        sizes = (c for c in self.conditions if c.name in _MICRO_CONDITIONS)
        told = denoiser.use_additional_conditions
        return (*rest, *(replace(c, optional=False) for c in sizes)) if told else rest

    def tokens(self, denoiser: Denoiser) -> Mapping[str, int]:
        # Sigma is not told the size of the picture, nor is alpha of other sizes than 1024 pixels.
        alpha = denoiser.use_additional_conditions
        text = ALPHA_TEXT_TOKENS if alpha else SIGMA_TEXT_TOKENS
        return {"image": image_tokens(denoiser), "text": text}
