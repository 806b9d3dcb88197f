"""Wan 2.1 and 2.2: `WanTransformer3DModel`, from text or from a picture to video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..groups import Denoiser
from .attentions import WAN
from .common import check_one_time
from .declared import Family
from .family import Blocks, Neurons
from .inputs import Condition

#: What the pipelines pad a prompt to; the model takes it for given where a picture comes before.
TEXT_TOKENS = 512

#: Of CLIP's encoding of a picture.
PICTURE_TOKENS = 257

#: Latents of 81 frames of 480x832 pixels, and, of the VAE of 48 channels (Wan 2.2 5B), of 121
#: frames of 704x1280.
_SIZES, _SIZES_48 = (21, 60, 104), (31, 44, 80)

_PICTURE, _BESIDE = "encoder_hidden_states_image", "beside"
_ACROSS = (("norm_q", "to_q"), ("norm_k", "to_k"), ("norm_added_k", "add_k_proj"))


class WanAdapter(Family):
    """Remove heads of self- and of cross-attention and GELU neurons from every block.

    Queries and keys go through norms over all heads together: where those stay exact, their
    projections stay whole.

    What a picture-to-video model is given beside the latents, as channels behind them (the mask and
    the picture's latents), is the condition `beside`. The null condition is the encoding of the
    empty prompt, as `negative_encoder_hidden_states`.
    """

    denoiser_class = "WanTransformer3DModel"
    pipelines = ("WanPipeline", "WanImageToVideoPipeline")
    summary = "heads of self- and cross-attention and FFN neurons of every block"
    norms = "across heads: exact (queries and keys stay whole) or approximate"
    processors = ("WanAttnProcessor",)
    leaves = (
        ("patch_embedding*", "patch embedder: its rows are the residual stream"),
        ("condition_embedder*", "embedders of timestep, text and picture"),
        ("blocks.*.norm*", "norms: as wide as the residual stream"),
        ("blocks.*", "modulation: as wide as the residual stream"),
        ("proj_out*", "output head: its columns are the residual stream"),
        ("", "modulation of the output: as wide as the residual stream"),
    )
    timestep_argument = ("timestep", 1)
    sigma_scale = 1000.0
    any_size = True
    conditions = (
        Condition("encoder_hidden_states", ("text", "text_dim")),
        Condition(_PICTURE, ("picture", "image_dim"), optional=True, null=False),
        Condition(_BESIDE, ("channels", "frames", "height", "width"), optional=True, null=False),
    )
    block_kinds = (
        Blocks(
            "blocks.*",
            (
                WAN.self_attention("attn1", across=_ACROSS),
                WAN.cross_attention(
                    "attn2", beside=(("picture", ("add_k_proj", "add_v_proj")),), across=_ACROSS
                ),
                Neurons("ffn", ("net.0.proj",), "net.2", "image"),
            ),
        ),
    )

    def check(self, denoiser: Denoiser) -> None:
        config = denoiser.config
        if config.pos_embed_seq_len is not None:
            raise ValueError(
                "prune: pos_embed_seq_len of a WanTransformer3DModel must be None, got "
                f"{config.pos_embed_seq_len}: models that are given the first and the last "
                "picture are not supported."
            )
        if (config.image_dim is None) != (config.added_kv_proj_dim is None):
            raise ValueError(
                "prune: image_dim and added_kv_proj_dim of a WanTransformer3DModel must be given "
                f"both or neither, got {config.image_dim} and {config.added_kv_proj_dim}."
            )
        super().check(denoiser)

    def conditions_for(self, denoiser: Denoiser) -> tuple[Condition, ...]:
        """Ask for a picture's encoding and for channels beside the latents where there are such."""
        config, needed = denoiser.config, {"encoder_hidden_states"}
        if config.image_dim is not None:
            needed.add(_PICTURE)
        if _beside(denoiser):
            needed.add(_BESIDE)
        return tuple(replace(c, optional=False) for c in self.conditions if c.name in needed)

    def check_inputs(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: dict[str, Any]
    ) -> None:
        super().check_inputs(denoiser, latents, inputs)
        if _BESIDE in inputs:
            expected = (_beside(denoiser), *latents.shape[2:])
            if tuple(inputs[_BESIDE].shape[1:]) != expected:
                raise ValueError(
                    f"calibration: {_BESIDE} must be (B, {', '.join(map(str, expected))}), the "
                    f"size of the latents, got {tuple(inputs[_BESIDE].shape)}."
                )
        tokens = inputs["encoder_hidden_states"].shape[1]
        if _PICTURE in inputs and tokens != TEXT_TOKENS:
            raise ValueError(
                f"calibration: encoder_hidden_states must be padded to {TEXT_TOKENS} tokens where "
                f"a picture is attended to, got {tokens}: the model counts on it."
            )

    def tokens(self, denoiser: Denoiser) -> Mapping[str, int]:
        frames, height, width = self.latent_shape(denoiser)[1:]
        f, h, w = denoiser.config.patch_size
        return {
            "image": (frames // f) * (height // h) * (width // w),
            "text": TEXT_TOKENS,
            "picture": 0 if denoiser.config.image_dim is None else PICTURE_TOKENS,
        }

    def example_sizes(self, denoiser: Denoiser) -> Mapping[str, int]:
        names = ("frames", "height", "width")
        sizes = dict(zip(names, self.latent_shape(denoiser)[1:], strict=True))
        return {**self.tokens(denoiser), **sizes, "channels": _beside(denoiser)}

    def latent_shape(self, denoiser: Denoiser) -> tuple[int, ...]:
        channels = denoiser.config.out_channels
        return (channels, *(_SIZES_48 if channels == 48 else _SIZES))

    def conditions_of(self, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        check_one_time(arguments["timestep"])
        given = arguments["hidden_states"]
        channels = arguments["self"].config.out_channels
        beside = given[:, channels:] if given.shape[1] > channels else None
        return super().conditions_of({**arguments, _BESIDE: beside})

    def predict(
        self,
        denoiser: Denoiser,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        inputs: dict[str, Any],
    ) -> torch.Tensor:
        rest = dict(inputs)
        beside = rest.pop(_BESIDE, None)
        if beside is not None:
            latents = torch.cat([latents, beside.to(latents)], dim=1)
        return super().predict(denoiser, latents, timesteps, rest)


def _beside(denoiser: Denoiser) -> int:
    """Return how many channels the denoiser is given behind those of the latents."""
    return denoiser.config.in_channels - denoiser.config.out_channels
