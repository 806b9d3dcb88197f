"""Whole tiny pipelines that draw videos (Wan, LTX), and Qwen-Image, whose VAE is Wan's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from .text_models import qwen_vl, t5, t5_tokenizer, word_tokenizer

#: Of the latents that Wan's and Qwen's VAEs speak of, for four channels.
_MEANS, _DEVIATIONS = [-0.2, 0.1, 0.3, -0.4], [1.5, 2.0, 0.7, 1.2]


def settle(denoiser: torch.nn.Module) -> Any:
    """Make the norms that start at one differ, so that a wrong slice shows."""
    for name, parameter in denoiser.named_parameters():
        if "norm" in name and parameter.ndim == 1 and bool((parameter == 1).all()):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return denoiser.eval().requires_grad_(False)


def tiny_wan(seed: int = 31) -> WanTransformer3DModel:
    """Wan 2.1 T2V: 3 blocks of 3 heads, 4 latent channels."""
    torch.manual_seed(seed)
    return settle(
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=3,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=12,
            freq_dim=16,
            ffn_dim=40,
            num_layers=3,
            rope_max_seq_len=64,
        )
    )


def _wan_vae(kind: Any = AutoencoderKLWan, **more: Any) -> Any:
    """A VAE that halves frames, height and width."""
    vae = kind(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=_MEANS,
        latents_std=_DEVIATIONS,
        **more,
    )
    return vae.eval()


def whole_wan(folder: Path, two: bool = False) -> WanPipeline:
    """Wan 2.1, or with `two` denoisers Wan 2.2, which change places at 0.6 of the timesteps."""
    transformer = tiny_wan()
    other = tiny_wan(seed=32) if two else None
    return WanPipeline(
        transformer=transformer,
        transformer_2=other,
        boundary_ratio=0.6 if two else None,
        vae=_wan_vae(scale_factor_temporal=2, scale_factor_spatial=2),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        tokenizer=t5_tokenizer(folder / "t5"),
        text_encoder=t5(multilingual=True),
    )


def tiny_ltx() -> LTXVideoTransformer3DModel:
    """LTX: 3 blocks of 3 heads, 4 latent channels."""
    torch.manual_seed(33)
    return settle(
        LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=3,
            attention_head_dim=8,
            cross_attention_dim=24,
            num_layers=3,
            caption_channels=12,
        )
    )


def whole_ltx(folder: Path) -> LTXPipeline:
    transformer = tiny_ltx()
    vae = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        timestep_conditioning=False,
        patch_size=2,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
        scaling_factor=0.8,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )
    vae.latents_mean.copy_(torch.tensor(_MEANS))
    vae.latents_std.copy_(torch.tensor(_DEVIATIONS))
    return LTXPipeline(
        transformer=transformer,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=t5_tokenizer(folder / "t5"),
        text_encoder=t5(),
    )


def tiny_qwen_image() -> QwenImageTransformer2DModel:
    """Qwen-Image: 4 double-stream blocks of 3 heads; 4 latent channels, packed to 16."""
    torch.manual_seed(34)
    return settle(
        QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
        )
    )


def qwen_image(folder: Path) -> QwenImagePipeline:
    transformer = tiny_qwen_image()
    return QwenImagePipeline(
        transformer=transformer,
        vae=_wan_vae(AutoencoderKLQwenImage),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        tokenizer=word_tokenizer(),
        text_encoder=qwen_vl(),
    )
