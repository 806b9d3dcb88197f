"""Published shapes with random weights: speed does not depend on what the weights are."""

from __future__ import annotations

import torch
from torch import nn

from ..adapters import adapter_for_class
from ..config import PruneConfig
from ..pipeline import cut
from ..runtime import StagedDenoiser

#: DiT of Peebles & Xie (arXiv 2212.09748), table 1, at 256x256 pixels (latents 4x32x32).
CONFIGURATIONS = {
    "dit-xl-2": {
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "patch_size": 2,
    },
    "dit-b-4": {
        "num_layers": 12,
        "num_attention_heads": 12,
        "attention_head_dim": 64,
        "patch_size": 4,
    },
}
_COMMON = {"in_channels": 4, "out_channels": 8, "sample_size": 32, "num_embeds_ada_norm": 1000}


def random_denoiser(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Make a dense denoiser of a named configuration, filled with small random numbers.

    Raises:
        ValueError: no such configuration.
    """
    if name not in CONFIGURATIONS:
        raise ValueError(
            f"random_denoiser: name must be one of {', '.join(CONFIGURATIONS)}, got {name!r}."
        )
    empty = adapter_for_class("DiTTransformer2DModel").empty(_COMMON | CONFIGURATIONS[name])
    for module in empty.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = torch.empty(parameter.shape, device=device, dtype=dtype)
                module._parameters[key] = nn.Parameter(
                    value.uniform_(-0.02, 0.02), requires_grad=False
                )
    return empty.to(device=device, dtype=dtype).eval()


def random_staged(denoiser: nn.Module, config: PruneConfig) -> StagedDenoiser:
    """Cut a random denoiser as a configuration plans it, on the linear schedule."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    return cut(denoiser, config, scheduler=scheduler)
