"""Tiny denoisers of the families with joint attention and parallel blocks."""

import torch
from diffusers import FluxTransformer2DModel

from .family_case import FamilyCase


def lively(model):
    """Give a denoiser weights under which every layer counts, always the same; in float32."""
    generator = torch.Generator().manual_seed(21)
    for name, parameter in model.named_parameters():
        if ".norm_" in name or "norm_q" in name or "norm_k" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        elif "norm" in name or "mod" in name:
            parameter.data.normal_(std=0.2, generator=generator)
        elif parameter.ndim == 1:
            parameter.data.normal_(std=0.1, generator=generator)
    return model.eval().requires_grad_(False)


def grid(height, width, axes, first=0):
    """Positions of tokens in rows, (height * width, axes), as pipelines number them."""
    ids = torch.zeros(height, width, axes)
    ids[..., first + 1] = torch.arange(height)[:, None]
    ids[..., first + 2] = torch.arange(width)
    return ids.reshape(height * width, axes)


def tiny_flux(layers=2, single=2, heads=3, guidance=True):
    torch.manual_seed(31)
    return lively(
        FluxTransformer2DModel(
            in_channels=8,
            num_layers=layers,
            num_single_layers=single,
            attention_head_dim=8,
            num_attention_heads=heads,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            guidance_embeds=guidance,
            axes_dims_rope=(2, 2, 4),
        )
    )


def flux_inputs(count, height=3, width=4, text=5, guidance=True, seed=9):
    generator = torch.Generator().manual_seed(seed)
    ids = grid(height, width, 3)
    inputs = {
        "encoder_hidden_states": torch.randn(count, text, 12, generator=generator),
        "pooled_projections": torch.randn(count, 10, generator=generator),
        "img_ids": ids.expand(count, *ids.shape),
    }
    if guidance:
        inputs["guidance"] = torch.full((count,), 3.5)
    return inputs


def latents(count, *shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(5))


def _flux(guidance):
    def batch():
        return latents(2, 12, 8), torch.full((2,), 640.0), flux_inputs(2, guidance=guidance)

    return batch


CASES = {
    "flux": FamilyCase(tiny_flux, _flux(True)),
    "flux-schnell": FamilyCase(lambda: tiny_flux(guidance=False), _flux(False)),
}
