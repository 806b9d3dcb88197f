"""Tiny denoisers of the families with joint attention and parallel blocks."""

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    QwenImageTransformer2DModel,
)

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


def tiny_flux(layers=2, single=2, heads=3, guidance=True, **config):
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
            **config,
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


def tiny_flux2(layers=2, single=2, heads=3, guidance=True, **config):
    torch.manual_seed(32)
    return lively(
        Flux2Transformer2DModel(
            in_channels=8,
            num_layers=layers,
            num_single_layers=single,
            attention_head_dim=8,
            num_attention_heads=heads,
            joint_attention_dim=12,
            timestep_guidance_channels=16,
            mlp_ratio=2.0,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=guidance,
            **config,
        )
    )


def flux2_inputs(count, height=3, width=4, text=5, seed=9):
    generator = torch.Generator().manual_seed(seed)
    ids = grid(height, width, 4).long()
    return {
        "encoder_hidden_states": torch.randn(count, text, 12, generator=generator),
        "guidance": torch.full((count,), 4.0),
        "img_ids": ids.expand(count, *ids.shape),
    }


def tiny_qwen(layers=3, heads=3, **config):
    torch.manual_seed(33)
    return lively(
        QwenImageTransformer2DModel(
            in_channels=8,
            out_channels=2,
            num_layers=layers,
            attention_head_dim=8,
            num_attention_heads=heads,
            joint_attention_dim=12,
            axes_dims_rope=(2, 2, 4),
            **config,
        )
    )


def qwen_inputs(count, height=3, width=4, text=5, seed=9):
    generator = torch.Generator().manual_seed(seed)
    lengths = text - torch.arange(count) % 3
    return {
        "encoder_hidden_states": torch.randn(count, text, 12, generator=generator),
        "encoder_hidden_states_mask": (torch.arange(text) < lengths[:, None]).long(),
        "img_shapes": torch.tensor([[1, height, width]]).expand(count, 1, 3),
    }


def tiny_hunyuan(layers=2, single=2, heads=3, guidance=True, **config):
    torch.manual_seed(34)
    return lively(
        HunyuanVideoTransformer3DModel(
            in_channels=2,
            out_channels=2,
            num_layers=layers,
            num_single_layers=single,
            num_refiner_layers=1,
            attention_head_dim=8,
            num_attention_heads=heads,
            mlp_ratio=2.0,
            text_embed_dim=12,
            pooled_projection_dim=10,
            rope_axes_dim=(2, 2, 4),
            guidance_embeds=guidance,
            **config,
        )
    )


def hunyuan_inputs(count, text=5, seed=9):
    generator = torch.Generator().manual_seed(seed)
    lengths = text - torch.arange(count) % 3
    return {
        "encoder_hidden_states": torch.randn(count, text, 12, generator=generator),
        "encoder_attention_mask": (torch.arange(text) < lengths[:, None]).long(),
        "pooled_projections": torch.randn(count, 10, generator=generator),
        "guidance": torch.full((count,), 6000.0),
    }


def latents(count, *shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(5))


def _batch(shape, inputs):
    return lambda: (latents(2, *shape), torch.full((2,), 640.0), inputs(2))


#: Shapes of one sample's latents.
PACKED, VIDEO = (12, 8), (2, 2, 4, 6)

CASES = {
    "flux": FamilyCase(tiny_flux, _batch(PACKED, flux_inputs)),
    "flux-schnell": FamilyCase(
        lambda: tiny_flux(guidance=False),
        _batch(PACKED, lambda count: flux_inputs(count, guidance=False)),
    ),
    "flux.2": FamilyCase(tiny_flux2, _batch(PACKED, flux2_inputs)),
    "qwen-image": FamilyCase(tiny_qwen, _batch(PACKED, qwen_inputs)),
    "hunyuan-video": FamilyCase(tiny_hunyuan, _batch(VIDEO, hunyuan_inputs)),
}
