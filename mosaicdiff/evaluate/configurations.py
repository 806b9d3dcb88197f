"""Published shapes with random weights: speed does not depend on what the weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters import adapter_for_class
from ..config import PruneConfig
from ..groups import Denoiser
from ..pipeline import cut
from ..runtime import StagedDenoiser


@dataclass(frozen=True)
class Configuration:
    """A published denoiser, without its weights.

    Args:
        denoiser_class: in diffusers.
        config: what differs from the class's defaults.
    """

    denoiser_class: str
    config: Mapping[str, Any]

    def empty(self) -> Denoiser:
        """Make the denoiser on the meta device."""
        return adapter_for_class(self.denoiser_class).empty(dict(self.config))


def _dit(layers: int, heads: int, width: int, patch: int) -> Configuration:
    """A DiT of Peebles & Xie (arXiv 2212.09748), table 1, at 256x256 pixels (latents 4x32x32)."""
    return Configuration(
        "DiTTransformer2DModel",
        {
            "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": width,
            "patch_size": patch, "in_channels": 4, "out_channels": 8, "sample_size": 32,
            "num_embeds_ada_norm": 1000,
        },
    )  # fmt: skip


#: By name: the shapes of the configurations that were published with the weights.
CONFIGURATIONS = {
    "dit-xl-2": _dit(28, 16, 72, 2),
    "dit-b-4": _dit(12, 12, 64, 4),
    # black-forest-labs/FLUX.1-dev: 19 blocks of two streams, 38 parallel ones, 24 heads of 128.
    "flux-dev": Configuration("FluxTransformer2DModel", {"guidance_embeds": True}),
    # stabilityai/stable-diffusion-3.5-large: 38 blocks, 38 heads of 64, norms of q and k.
    "sd3.5-large": Configuration(
        "SD3Transformer2DModel",
        {
            "num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64,
            "caption_projection_dim": 2432, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
        },
    ),
    # PixArt-alpha/PixArt-Sigma-XL-2-1024-MS: as wide as DiT-XL/2, with attention to the text.
    "pixart-sigma-xl": Configuration(
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False},
    ),
    # stabilityai/stable-diffusion-xl-base-1.0: heads of 64; 70 transformer blocks.
    "sdxl": Configuration(
        "UNet2DConditionModel",
        {
            "sample_size": 128, "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    # Wan-AI/Wan2.1-T2V-14B: 40 blocks, 40 heads of 128, FFN of 13824.
    "wan-2.1-14b": Configuration("WanTransformer3DModel", {"text_dim": 4096}),
}  # fmt: skip


def configuration(name: str) -> Configuration:
    """Return a named configuration.

    Raises:
        ValueError: no such configuration.
    """
    if name not in CONFIGURATIONS:
        raise ValueError(
            f"random_denoiser: name must be one of {', '.join(CONFIGURATIONS)}, got {name!r}."
        )
    return CONFIGURATIONS[name]


def random_denoiser(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Make a dense denoiser of a named configuration, filled with small random numbers.

    Raises:
        ValueError: no such configuration.
    """
    empty = configuration(name).empty()
    for module in empty.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = torch.empty(parameter.shape, device=device, dtype=dtype)
                module._parameters[key] = nn.Parameter(
                    value.uniform_(-0.02, 0.02), requires_grad=False
                )
    # Not diffusers' own `to`, which warns of types whatever they are.
    made: nn.Module = nn.Module.to(empty, device=device, dtype=dtype).eval()
    if type(made).__name__ == "DiTTransformer2DModel":
        _repeat_embedders(made)
    return made


def _repeat_embedders(dit: Denoiser) -> None:
    """Give every block the first one's embedder, as published DiT checkpoints do."""
    first, *others = (block.norm1.emb for block in dit.transformer_blocks)
    for other in others:
        other.load_state_dict(first.state_dict())


def random_staged(denoiser: Denoiser, config: PruneConfig) -> StagedDenoiser:
    """Cut a denoiser as a configuration plans it, on the schedule usual for its family.

    Flow matching with shift 3 where the family has no other (as of SD3), the scaled linear schedule
    of Stable Diffusion for U-Nets, else the linear one. The weights mean nothing, and may be on
    the meta device.
    """
    return cut(denoiser, config, scheduler=usual_scheduler(denoiser))


def usual_scheduler(denoiser: Denoiser) -> Any:
    """Return a scheduler of the schedule that is usual for a denoiser's family."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    name = type(denoiser).__name__
    if adapter_for_class(name).sigma_scale is not None:
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name == "UNet2DConditionModel":
        return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
