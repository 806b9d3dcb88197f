"""Pictures from latents, and what is measured of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

#: Of the structural similarity: Wang et al., 2004.
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return pictures (B, C, H, W) in [0, 1], float32, of shifted and scaled latents."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    pictures = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift).sample
    return (pictures.float() / 2 + 0.5).clamp(0, 1)


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the mean structural similarity of pictures (B, C, H, W) in [0, 1].

    Gaussian windows of 11 pixels (the largest odd number that fits, for smaller pictures).

    Source: Wang, Bovik, Sheikh, Simoncelli, 2004.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"ssim: pictures must be two of one shape (B, C, H, W), got {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
    size = min(_WINDOW, *(n - (n + 1) % 2 for n in a.shape[-2:]))
    offsets = torch.arange(size, dtype=torch.float64, device=a.device) - size // 2
    line = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    line = line / line.sum()
    channels = a.shape[1]
    window = torch.outer(line, line).expand(channels, 1, size, size)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, window, groups=channels)

    a, b = a.double(), b.double()
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = _K1**2, _K2**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the mean of -10 log10(squared error), in dB, over pictures (B, C, H, W) in [0, 1].

    Infinite where a picture equals its counterpart.
    """
    if a.shape != b.shape or a.ndim != 4 or not len(a):
        raise ValueError(
            f"psnr: pictures must be two of one shape (B, C, H, W), got {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
    errors = (a.double() - b.double()).square().flatten(1).mean(1)
    return float((-10 * errors.log10()).mean())


def picture_metric(name: str) -> Callable[[torch.Tensor], float]:
    """Return a quality metric of pyiqa as an error: lower is better.

    Raises:
        ValueError: pyiqa is not installed, or knows no such metric without a reference.
    """
    try:
        import pyiqa
    except ImportError:
        raise ValueError(
            f"search: fitness iqa:{name} needs the package pyiqa, which is not installed. "
            "pip install pyiqa, or use latent, trajectory or ssim."
        ) from None
    if name not in pyiqa.list_models(metric_mode="NR"):
        raise ValueError(
            f"search: fitness iqa:{name} must name a metric of pyiqa that needs no reference, "
            "e.g. topiq_nr."
        )
    metric = pyiqa.create_metric(name)
    sign = 1.0 if metric.lower_better else -1.0
    return lambda pictures: sign * float(metric(pictures).mean())
