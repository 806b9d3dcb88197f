"""From pixels to the latents that a pipeline's scheduler steps."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Pixels of a batch for the VAE, all frames, and rows: a picture of 1024 x 1024 at a time.
_PIXELS, _ROWS = 1 << 20, 64


def encode_pixels(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels into clean latents as the pipeline's scheduler would end with them.

    The mode of the VAE's distribution, shifted and scaled as the family has it
    ((z - shift) * factor, or (z - mean) / deviation for each channel), and packed into tokens
    where the pipeline packs its latents.

    Args:
        pipe: with its VAE.
        pixels: (B, C, H, W), or for a video VAE (B, C, F, H, W), in [-1, 1].

    Returns:
        (B, ...) in float32 on the CPU.

    Raises:
        ValueError: the VAE says neither a factor nor mean and deviation.
    """
    vae = pipe.vae
    parameter = next(vae.parameters())
    with torch.no_grad(), _stable(vae) as dtype:
        encoded = vae.encode(pixels.to(parameter.device, dtype))
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.mode()
        else:
            latents = encoded.latent  # a VAE without a distribution (DC-AE)
        return pack(pipe, normalise(vae, latents.float())).cpu()


def batch_rows(frames: int, height: int, width: int) -> int:
    """Return how many pictures or videos the VAE is given at once, where memory allows it.

    At most 64, and 2^20 pixels of all frames together, or one. On a GPU a batch that does not fit
    is halved (see `batching.halving`).
    """
    return max(1, min(_ROWS, _PIXELS // max(1, frames * height * width)))


def normalise(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Shift and scale a VAE's latents (B, C, ...) to those that the denoiser was trained on."""
    config = vae.config
    factor, shift = config.get("scaling_factor"), config.get("shift_factor")
    mean, deviation = (_channels(vae, name, latents) for name in ("latents_mean", "latents_std"))
    if factor is None and mean is None:
        raise ValueError(
            f"calibration: the VAE must say how its latents are scaled, but {type(vae).__name__} "
            "has neither scaling_factor nor latents_mean. Give latents instead of images."
        )
    if mean is not None and deviation is not None:
        latents = (latents - mean) / deviation
    if shift is not None:
        latents = latents - shift
    return latents if factor is None else latents * factor


def pack(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Turn latents (B, C, ..., H, W) into tokens as a pipeline does; others stay as they are."""
    packer = getattr(pipe, "_pack_latents", None)
    if packer is None:
        return latents
    denoiser = getattr(pipe, "transformer", None)
    known = {
        "latents": latents,
        "batch_size": len(latents),
        "num_channels_latents": latents.shape[1],
        "height": latents.shape[-2],
        "width": latents.shape[-1],
        "patch_size": getattr(getattr(denoiser, "config", None), "patch_size", 1),
        "patch_size_t": getattr(getattr(denoiser, "config", None), "patch_size_t", 1),
    }
    wanted = inspect.signature(packer).parameters
    return packer(**{name: known[name] for name in wanted if name in known})


def _channels(vae: Any, name: str, latents: torch.Tensor) -> torch.Tensor | None:
    """Return what a VAE says of each channel, as a buffer or in its configuration."""
    values = dict(vae.named_buffers()).get(name)
    if values is None:
        values = vae.config.get(name)
    if values is None:
        return None
    held = torch.as_tensor(values, dtype=torch.float32, device=latents.device)
    return held.reshape(1, -1, *[1] * (latents.ndim - 2))


@contextmanager
def _stable(vae: Any) -> Iterator[torch.dtype]:
    """Encode in float32 where float16 would overflow, as the pipelines decode; yields the type."""
    dtype = next(vae.parameters()).dtype
    if dtype != torch.float16 or not vae.config.get("force_upcast"):
        yield dtype
        return
    vae.to(torch.float32)
    try:
        yield torch.float32
    finally:
        vae.to(dtype)
