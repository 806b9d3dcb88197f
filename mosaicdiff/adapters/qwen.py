"""Qwen-Image: `QwenImageTransformer2DModel`, blocks of two streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..groups import Denoiser
from .attentions import LEGACY
from .declared import Family
from .family import Blocks, Neurons
from .inputs import Condition

#: Rows of tokens of an image of 1024x1024 pixels: 8 pixels a latent, 2x2 latents a token.
IMAGE_SIDE = 64
#: Text tokens of `QwenImagePipeline` at most, by default. It passes as many as the prompt has.
TEXT_TOKENS = 512


class QwenImageAdapter(Family):
    """Remove heads of joint attention from both streams, and GELU neurons of each.

    `img_shapes` is, for each sample, the frames, rows and columns of tokens of its images.
    """

    denoiser_class = "QwenImageTransformer2DModel"
    pipelines = ("QwenImagePipeline",)
    summary = "heads of joint attention and FFN neurons of both streams"
    norms = "per head: exact"
    processors = ("QwenDoubleStreamAttnProcessor2_0",)
    leaves = (
        ("img_in*", "patch embedder: its rows are the residual stream"),
        ("txt_in*", "text embedder: its rows are the residual stream"),
        ("txt_norm*", "norm of the text encodings"),
        ("time_text_embed*", "embedder of the timestep"),
        ("transformer_blocks.*.attn.norm_*", "norms over the channels of one head"),
        ("transformer_blocks.*_mod*", "modulation: as wide as the residual stream"),
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
        Condition("encoder_hidden_states_mask", ("text",), whole_numbers=True, optional=True),
        Condition("img_shapes", ("images", 3), null=False, per_call=True, whole_numbers=True),
    )
    block_kinds = (
        Blocks(
            "transformer_blocks.*",
            (
                LEGACY.joint_attention(),
                Neurons("img_mlp", ("net.0.proj",), "net.2", "image"),
                Neurons("txt_mlp", ("net.0.proj",), "net.2", "text"),
            ),
        ),
    )

    def check(self, denoiser: Denoiser) -> None:
        for name in ("use_additional_t_cond", "use_layer3d_rope"):
            if getattr(denoiser.config, name, False):
                raise ValueError(
                    f"prune: {name} must be off, got on. Qwen-Image-Layered, which draws several "
                    "layers at once, is not handled."
                )
        super().check(denoiser)

    def tokens(self, denoiser: Denoiser) -> Mapping[str, int]:
        return {"image": IMAGE_SIDE**2, "text": TEXT_TOKENS}

    def latent_shape(self, denoiser: Denoiser) -> tuple[int, ...]:
        return IMAGE_SIDE**2, denoiser.config.in_channels

    def check_inputs(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: dict[str, Any]
    ) -> None:
        super().check_inputs(denoiser, latents, inputs)
        shapes = inputs["img_shapes"]
        count = int(shapes[0].prod(dim=-1).sum()) if len(shapes) else None
        if latents.ndim != 3 or count not in (None, latents.shape[1]):
            raise ValueError(
                "calibration: latents must be packed (B, T, C), as the pipeline steps them, with T "
                f"the tokens of img_shapes ({count}), got {tuple(latents.shape)}."
            )

    def example_inputs(
        self, denoiser: Denoiser, batch_size: int, device: torch.device
    ) -> dict[str, Any]:
        # Numbers: where only shapes are followed, a tensor has no values to read.
        found: dict[str, Any] = super().example_inputs(denoiser, batch_size, device)
        return found | {"img_shapes": [[(1, IMAGE_SIDE, IMAGE_SIDE)]] * batch_size}

    def conditions_of(self, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        # A list of sizes for each sample, of which the denoiser reads the first sample's.
        sizes = arguments["img_shapes"][0]
        first = sizes if isinstance(sizes, list) else [sizes]
        return super().conditions_of({**arguments, "img_shapes": torch.tensor(first)})

    def given_timesteps(
        self, denoiser: Denoiser, timesteps: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        return timesteps.to(latents.dtype) / 1000

    def arguments(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        sizes = inputs["img_shapes"][0]
        sizes = sizes.tolist() if torch.is_tensor(sizes) else sizes
        rest = {name: value for name, value in inputs.items() if name != "img_shapes"}
        found = super().arguments(denoiser, latents, rest)
        return found | {"img_shapes": [[tuple(size) for size in sizes]] * len(latents)}
