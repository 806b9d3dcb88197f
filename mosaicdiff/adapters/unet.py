"""U-Nets of SDXL, SD 1.5 and SD 2.1: `UNet2DConditionModel`, its transformer blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..groups import Denoiser
from .attentions import LEGACY
from .declared import Family
from .family import Blocks, Neurons
from .inputs import Condition

#: Text tokens of CLIP.
TEXT_TOKENS = 77

#: Numbers that SDXL is told of a picture's size and crop (its refiner: five).
TIME_IDS = 6


# `attention_head_dim` of these configurations is the number of heads, for each level or for all:
# the width of a head is read off the projections.
_LAYERS = (
    LEGACY.self_attention("attn1", width=""),
    LEGACY.cross_attention("attn2", width=""),
    Neurons("ff", ("net.0.proj",), "net.2", "image"),
)


class UNetAdapter(Family):
    """Remove heads of self- and cross-attention and GEGLU neurons of the transformer blocks.

    Residual blocks, samplers and the projections into and out of transformers stay whole. The
    null condition is the encoding of the empty prompt, or for SDXL zeros: where the batches hold
    it as `negative_...`, `null_share` takes from it.
    """

    denoiser_class = "UNet2DConditionModel"
    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionPipeline")
    summary = "heads of self- and cross-attention and GEGLU neurons of every transformer block"
    norms = "none"
    processors = ("AttnProcessor", "AttnProcessor2_0")
    leaves = (
        ("conv_in*", "first convolution: its rows are the residual stream"),
        ("conv_out*", "output head: its columns are the residual stream"),
        ("conv_norm_out*", "norm of the residual stream"),
        ("time_embedding*", "embedder of the timestep"),
        ("add_embedding*", "embedder of pooled text and picture size"),
        ("*.resnets.*", "residual block: its convolutions are not pruned"),
        ("*.downsamplers.*", "convolution of the residual stream"),
        ("*.upsamplers.*", "convolution of the residual stream"),
        ("*.proj_in*", "into the transformer: its rows are the residual stream"),
        ("*.proj_out*", "out of the transformer: its columns are the residual stream"),
        ("*.norm*", "norm of the residual stream"),
    )
    timestep_argument = ("timestep", 1)
    conditions = (
        Condition("encoder_hidden_states", ("text", "cross_attention_dim")),
        Condition("added_cond_kwargs.text_embeds", ("pooled",), optional=True),
        Condition("added_cond_kwargs.time_ids", ("ids",), optional=True, null=False),
        Condition("timestep_cond", ("time_cond_proj_dim",), optional=True, null=False),
    )
    block_kinds = (
        Blocks("down_blocks.*.attentions.*.transformer_blocks.*", _LAYERS),
        Blocks("mid_block.attentions.*.transformer_blocks.*", _LAYERS),
        Blocks("up_blocks.*.attentions.*.transformer_blocks.*", _LAYERS),
    )

    def check(self, denoiser: Denoiser) -> None:
        """Refuse what would be called, or attended, in another way than is declared."""
        config = denoiser.config
        for name, usual in _USUAL.items():
            value = getattr(config, name)
            values = set(value) if isinstance(value, (list, tuple)) else {value}
            if not values <= usual:
                expected = " or ".join(map(repr, sorted(usual, key=str)))
                raise ValueError(
                    f"prune: {name} of a UNet2DConditionModel must be {expected}, got {value!r}. "
                    "This kind of U-Net is not supported."
                )
        if not isinstance(config.sample_size, int):
            raise ValueError(
                "prune: sample_size of a UNet2DConditionModel must be a number, got "
                f"{config.sample_size!r}: costs are counted for squares of that side. "
                "Put it in the configuration: 64 for SD 1.5, 96 for SD 2.1, 128 for SDXL."
            )
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"prune: in_channels must be out_channels ({config.out_channels}), got "
                f"{config.in_channels}: U-Nets that are given a picture beside the latents "
                "(inpainting, instructions) are not supported."
            )
        if not self.blocks(denoiser):
            raise ValueError(
                "prune: denoiser must have transformer blocks, but this UNet2DConditionModel has "
                "none: there is nothing that could be removed."
            )
        super().check(denoiser)

    def conditions_for(self, denoiser: Denoiser) -> tuple[Condition, ...]:
        """Ask for pooled text and sizes where SDXL is told them, and for guidance where it is."""
        config, needed = denoiser.config, {"encoder_hidden_states"}
        if config.addition_embed_type == "text_time":
            needed |= {"text_embeds", "time_ids"}
        if config.time_cond_proj_dim is not None:
            needed.add("timestep_cond")
        return tuple(replace(c, optional=False) for c in self.conditions if c.name in needed)

    def check_inputs(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: dict[str, Any]
    ) -> None:
        super().check_inputs(denoiser, latents, inputs)
        config = denoiser.config
        if config.addition_embed_type == "text_time":
            width = config.projection_class_embeddings_input_dim
            pooled, ids = inputs["text_embeds"].shape[1], inputs["time_ids"].shape[1]
            if pooled + ids * config.addition_time_embed_dim != width:
                raise ValueError(
                    "calibration: text_embeds and time_ids must give "
                    f"{width} = text_embeds + {config.addition_time_embed_dim} * time_ids, got "
                    f"widths {pooled} and {ids}."
                )

    def tokens(self, denoiser: Denoiser) -> Mapping[str, int]:
        """Return the tokens of the text, and those of the picture at its finest level."""
        return {"image": _side(denoiser, 0) ** 2, "text": TEXT_TOKENS}

    def example_sizes(self, denoiser: Denoiser) -> Mapping[str, int]:
        config, found = denoiser.config, dict(self.tokens(denoiser))
        if config.addition_embed_type == "text_time":
            sizes = TIME_IDS * config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - sizes
            found |= {"pooled": pooled, "ids": TIME_IDS}
        return found

    def block_tokens(self, denoiser: Denoiser, block: str) -> Mapping[str, int]:
        """Return the tokens of a block: each level of the U-Net halves both sides."""
        place, index = block.split(".")[:2]
        last = len(denoiser.down_blocks) - 1
        level = last  # of the middle
        if place != "mid_block":
            level = int(index) if place == "down_blocks" else last - int(index)
        return {"image": _side(denoiser, level) ** 2, "text": TEXT_TOKENS}


#: Settings of a configuration that change how blocks are called or wired, and what they may be.
_USUAL: dict[str, set[Any]] = {
    "only_cross_attention": {False},
    "dual_cross_attention": {False},
    "encoder_hid_dim_type": {None},
    "class_embed_type": {None},
    "num_class_embeds": {None},
    "addition_embed_type": {None, "text_time"},
    "attention_type": {"default"},
}


def _side(denoiser: Denoiser, level: int) -> int:
    """Return the side of the latents at a level, at the native size."""
    side = denoiser.config.sample_size
    for _ in range(level):
        side = -(-side // 2)
    return side
