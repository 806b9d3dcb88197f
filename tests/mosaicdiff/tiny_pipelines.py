"""Whole tiny pipelines of every family, with random weights that are always the same.

Each has text encoders, tokenizers and a VAE of its own, so that it is saved, loaded and asked in
words as a real one is; each samples a few steps in well under two seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from .conftest import tiny_sd3, tiny_sd3_pipeline
from .text_models import (
    clip,
    clip_tokenizer,
    gemma2,
    t5,
    t5_tokenizer,
    whole_sd3,
    word_tokenizer,
)
from .tiny_schedulers import (
    ddim,
    dpm,
    euler,
    flow_dpm,
    flow_dynamic,
    flow_euler,
    flow_heun,
    flow_unipc,
)
from .tiny_videos import (
    qwen_image,
    settle,
    tiny_ltx,
    tiny_qwen_image,
    tiny_wan,
    whole_ltx,
    whole_wan,
)

Scheduler = Callable[[], Any]


@dataclass(frozen=True)
class TinyPipeline:
    """One family: how to make it, and how to ask it.

    Args:
        make: the whole pipeline, given a folder for its vocabularies.
        schedulers: two or more that suit it; the first is the pipeline's own.
        options: of its call, for a quick picture.
        denoiser_class: of the denoiser.
        component: where it is.
        frames: whether it draws videos, whose pictures are called frames.
    """

    make: Callable[[Path], DiffusionPipeline]
    schedulers: tuple[Scheduler, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    denoiser_class: str = ""
    component: str = "transformer"
    frames: bool = False

    def whole(self, folder: Path) -> DiffusionPipeline:
        """Make the pipeline, quiet, writing its vocabularies into a folder."""
        pipe = self.make(folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(
        self,
        pipe: DiffusionPipeline,
        prompt: str | list[str] = "a cat",
        steps: int = 3,
        **more: Any,
    ) -> torch.Tensor:
        """Draw pictures (B, ...), or final latents with output_type="latent"."""
        options = {"output_type": "pt", **self.options, **more}
        with torch.random.fork_rng([]):
            torch.manual_seed(5)  # of what pipelines draw without their generator
            drawn = pipe(
                prompt,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(5),
                **options,
            )
        return drawn.frames if self.frames else drawn.images


def _vae(channels: int = 2, **config: Any) -> AutoencoderKL:
    """A VAE that halves height and width."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        **config,
    ).eval()


def tiny_unet(xl: bool = True) -> UNet2DConditionModel:
    """The U-Net of SDXL, or of SD1.5: 8 x 8 latents, 3 heads, cross attention to 16 wide texts."""
    torch.manual_seed(21)
    more: dict[str, Any] = (
        {
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 10 + 6 * 4,
        }
        if xl
        else {}
    )
    cross = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    if not xl:
        cross = ("CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
    return settle(
        UNet2DConditionModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            down_block_types=cross[:2],
            up_block_types=cross[2:],
            block_out_channels=(24, 24),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=3,
            cross_attention_dim=16,
            **more,
        )
    )


def sdxl(folder: Path) -> StableDiffusionXLPipeline:
    unet = tiny_unet()
    tokenizers = [clip_tokenizer(folder / name) for name in ("clip", "clip-2")]
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(scaling_factor=0.13),
        scheduler=euler(),
        tokenizer=tokenizers[0],
        text_encoder=clip(tokenizers[0], 6, 6, CLIPTextModel),
        tokenizer_2=tokenizers[1],
        text_encoder_2=clip(tokenizers[1], 10, 10),
        add_watermarker=False,
    )


def sd15(folder: Path) -> StableDiffusionPipeline:
    unet = tiny_unet(xl=False)
    tokenizer = clip_tokenizer(folder / "clip")
    return StableDiffusionPipeline(
        unet=unet,
        vae=_vae(scaling_factor=0.18),
        scheduler=ddim(),
        tokenizer=tokenizer,
        text_encoder=clip(tokenizer, 16, 16, CLIPTextModel),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd3(folder: Path) -> DiffusionPipeline:
    return whole_sd3(tiny_sd3_pipeline(tiny_sd3(layers=4)), folder)


def tiny_flux(guidance: bool = True) -> FluxTransformer2DModel:
    """FLUX.1: 3 double and 3 single blocks of 3 heads; 2 latent channels, packed to 8."""
    torch.manual_seed(22)
    return settle(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=8,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            guidance_embeds=guidance,
            axes_dims_rope=(2, 2, 4),
        )
    )


def flux(folder: Path) -> FluxPipeline:
    transformer = tiny_flux()
    tokenizer = clip_tokenizer(folder / "clip")
    return FluxPipeline(
        transformer=transformer,
        vae=_vae(scaling_factor=0.36, shift_factor=0.1159, use_quant_conv=False),
        scheduler=flow_dynamic(),
        tokenizer=tokenizer,
        text_encoder=clip(tokenizer, 10, 10, CLIPTextModel),
        tokenizer_2=t5_tokenizer(folder / "t5"),
        text_encoder_2=t5(),
    )


def tiny_pixart(alpha: bool = False) -> PixArtTransformer2DModel:
    """PixArt: 3 blocks of 3 heads on 8 x 8 latents.

    Alpha is told resolution and aspect ratio, which its pipeline does at 128 x 128 latents only.
    """
    torch.manual_seed(23)
    return settle(
        PixArtTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=8,
            in_channels=2,
            out_channels=4,
            num_layers=3,
            cross_attention_dim=24,
            sample_size=128 if alpha else 8,
            patch_size=2,
            caption_channels=12,
            use_additional_conditions=alpha,
        )
    )


def _pixart(kind: type[DiffusionPipeline], alpha: bool) -> Callable[[Path], DiffusionPipeline]:
    def make(folder: Path) -> DiffusionPipeline:
        transformer = tiny_pixart(alpha)
        return kind(
            transformer=transformer,
            vae=_vae(scaling_factor=0.13),
            scheduler=dpm(),
            tokenizer=t5_tokenizer(folder / "t5"),
            text_encoder=t5(),
        )

    return make


def tiny_sana() -> SanaTransformer2DModel:
    """Sana: 3 blocks, linear attention of 3 heads and cross attention of 4."""
    torch.manual_seed(24)
    return settle(
        SanaTransformer2DModel(
            in_channels=2,
            out_channels=2,
            num_attention_heads=3,
            attention_head_dim=8,
            num_layers=3,
            num_cross_attention_heads=4,
            cross_attention_head_dim=6,
            cross_attention_dim=24,
            caption_channels=12,
            mlp_ratio=2.0,
            sample_size=8,
            patch_size=1,
        )
    )


def sana(folder: Path) -> SanaPipeline:
    transformer = tiny_sana()
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=2,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return SanaPipeline(
        transformer=transformer,
        vae=vae.eval(),
        scheduler=flow_dpm(),
        tokenizer=word_tokenizer(),
        text_encoder=gemma2(),
    )


_SMALL = {"height": 16, "width": 16}
_CLEAN = {"clean_caption": False, "use_resolution_binning": False, "max_sequence_length": 8}
_VIDEO = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 8}

#: Every family that is made here, by a short name.
PIPELINES: dict[str, TinyPipeline] = {
    "sd15": TinyPipeline(sd15, (ddim, euler), {}, "UNet2DConditionModel", "unet"),
    "sdxl": TinyPipeline(sdxl, (euler, ddim), {}, "UNet2DConditionModel", "unet"),
    "sd3": TinyPipeline(
        sd3, (flow_euler, flow_heun), {"max_sequence_length": 8}, "SD3Transformer2DModel"
    ),
    "flux": TinyPipeline(
        flux, (flow_dynamic, flow_unipc), {**_SMALL, "max_sequence_length": 8},
        "FluxTransformer2DModel",
    ),
    "pixart-alpha": TinyPipeline(
        _pixart(PixArtAlphaPipeline, True), (dpm, ddim), {**_SMALL, **_CLEAN},
        "PixArtTransformer2DModel",
    ),
    "pixart-sigma": TinyPipeline(
        _pixart(PixArtSigmaPipeline, False), (dpm, ddim), _CLEAN, "PixArtTransformer2DModel"
    ),
    "sana": TinyPipeline(
        sana,
        (flow_dpm, flow_euler),
        {**_CLEAN, "height": 32, "width": 32, "complex_human_instruction": None},
        "SanaTransformer2DModel",
    ),
    "qwen-image": TinyPipeline(
        qwen_image,
        (flow_dynamic, flow_euler),
        {**_SMALL, "max_sequence_length": 8, "negative_prompt": "b", "true_cfg_scale": 3.0},
        "QwenImageTransformer2DModel",
    ),
    "wan": TinyPipeline(
        whole_wan, (flow_unipc, flow_euler), _VIDEO, "WanTransformer3DModel", frames=True
    ),
    "wan-2": TinyPipeline(
        functools.partial(whole_wan, two=True), (flow_unipc, flow_euler), _VIDEO,
        "WanTransformer3DModel", frames=True,
    ),
    "ltx": TinyPipeline(
        whole_ltx, (flow_euler, flow_dynamic), {**_VIDEO, "height": 32, "width": 32},
        "LTXVideoTransformer3DModel", frames=True,
    ),
}  # fmt: skip

__all__ = [
    "PIPELINES",
    "TinyPipeline",
    "tiny_flux",
    "tiny_ltx",
    "tiny_pixart",
    "tiny_qwen_image",
    "tiny_sana",
    "tiny_unet",
    "tiny_wan",
]
