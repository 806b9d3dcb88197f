"""Tiny real denoisers, and the embedded model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)

import mosaicdiff


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny_denoiser(layers: int = 3, heads: int = 4, bias: bool = True) -> DiTTransformer2DModel:
    """A DiT whose blocks all matter (adaLN and output away from their start), always the same."""
    torch.manual_seed(11)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=8,
        in_channels=2,
        out_channels=2,
        num_layers=layers,
        sample_size=8,
        attention_bias=bias,
        num_embeds_ada_norm=1000,
    )
    for name, parameter in model.named_parameters():
        if "norm1.linear" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def tiny_batches(count: int = 48, channels: int = 2) -> list:
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(channels * 64, channels * 64, generator=generator) / 8
    latents = torch.randn(count, channels * 64, generator=generator) @ mixing
    labels = torch.randint(0, 10, (count,), generator=generator)
    return [(latents.reshape(count, channels, 8, 8), {"class_labels": labels})]


def linear_scheduler(cls=DDIMScheduler, **kwargs):
    return cls(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, **kwargs)


@pytest.fixture
def denoiser():
    return tiny_denoiser()


@pytest.fixture
def batches():
    return tiny_batches()


def tiny_pipeline(denoiser) -> DiTPipeline:
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, latent_channels=2
    )
    pipeline = DiTPipeline(
        transformer=denoiser, vae=vae.eval(), scheduler=linear_scheduler(clip_sample=False)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipe(denoiser):
    return tiny_pipeline(denoiser)


@dataclass(frozen=True)
class TinyModel:
    """A tiny pipeline on disk, and options that name it and prune it quickly."""

    folder: Path
    latents: Path

    @property
    def options(self) -> tuple:
        return (self.folder, "--calibration", self.latents, "--samples", 32, "--steps", 20)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyModel:
    place = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(tiny_denoiser()).save_pretrained(place / "model")
    latents, inputs = tiny_batches()[0]
    labels = inputs["class_labels"].numpy()
    np.savez(place / "latents.npz", latents=latents.numpy(), labels=labels)
    return TinyModel(place / "model", place / "latents.npz")


@pytest.fixture(scope="session")
def tiny_file(tiny) -> Path:
    """The tiny model calibrated by `mosaicdiff calibrate`, in its three stages."""
    from .commands import run_json

    run_json("calibrate", *tiny.options, "--output", tiny.folder.parent / "stages.cal")
    return tiny.folder.parent / "stages.cal"


@pytest.fixture
def staged_pipe(pipe, batches):
    config = mosaicdiff.PruneConfig(sparsity=0.4, samples=48, steps=20)
    mosaicdiff.prune(pipe, config, calibration=batches)
    return pipe


def sample(pipeline, steps: int = 8, guidance: float = 1.0):
    """Pictures of three classes, as an array."""
    return pipeline(
        [1, 2, 3],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.manual_seed(3),
        output_type="np",
    ).images


def tiny_sd3(
    layers: int = 3, dual: tuple[int, ...] = (0, 2), qk_norm: str | None = "rms_norm"
) -> SD3Transformer2DModel:
    """An SD3 whose blocks all matter, always the same; `dual` blocks have a second attention.

    SD3 itself is `dual=(), qk_norm=None`.
    """
    torch.manual_seed(12)
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=10,
        pos_embed_max_size=6,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    )
    for name, parameter in model.named_parameters():
        if "norm1" in name and "linear" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif ".norm_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval().requires_grad_(False)


def tiny_sd3_batches(count: int = 48, text: int = 5, null: bool = True) -> list:
    """Latents with random encodings, and those of an empty prompt where `null`."""
    generator = torch.Generator().manual_seed(8)
    inputs = {
        "encoder_hidden_states": torch.randn(count, text, 12, generator=generator),
        "pooled_projections": torch.randn(count, 10, generator=generator),
    }
    if null:
        inputs |= {
            f"negative_{name}": value[:1].flip(-1).expand(value.shape).clone()
            for name, value in inputs.items()
        }
    return [(tiny_batches(count)[0][0], inputs)]


def flow_scheduler(cls=FlowMatchEulerDiscreteScheduler, **kwargs):
    """The sampler of SD3 and SD3.5."""
    return cls(**{"shift": 3.0} | kwargs)


#: Loading a pipeline that has no text encoders wants them named.
NO_ENCODERS = {
    f"{kind}{number}": None for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")
}


def tiny_sd3_pipeline(denoiser):
    """A StableDiffusion3Pipeline without text encoders: it is given prompt embeddings."""
    pytest.importorskip("transformers", reason="diffusers' SD3 pipeline needs transformers")
    from diffusers import StableDiffusion3Pipeline

    torch.manual_seed(13)
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        latent_channels=2, shift_factor=0.1,
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=denoiser, vae=vae.eval(), scheduler=flow_scheduler(), **NO_ENCODERS
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_sd3(pipeline, steps: int = 8, guidance: float = 1.0, **options):
    """Pictures of three prompts, as an array."""
    _, inputs = tiny_sd3_batches(3)[0]
    return pipeline(
        prompt_embeds=inputs["encoder_hidden_states"],
        pooled_prompt_embeds=inputs["pooled_projections"],
        negative_prompt_embeds=inputs["negative_encoder_hidden_states"],
        negative_pooled_prompt_embeds=inputs["negative_pooled_projections"],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.manual_seed(3),
        output_type="np",
        **options,
    ).images


@pytest.fixture(scope="session")
def tiny_sd3_folder(tmp_path_factory) -> Path:
    """A whole tiny SD3.5 pipeline on disk, with text encoders and tokenizers of its own."""
    pytest.importorskip("transformers", reason="diffusers' SD3 pipeline needs transformers")
    from .text_models import whole_sd3

    place = tmp_path_factory.mktemp("tiny-sd3")
    whole_sd3(tiny_sd3_pipeline(tiny_sd3(layers=4)), place).save_pretrained(place / "model")
    return place / "model"
