"""Layers to measure on: synthetic ones, and the readers of the embedded model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mosaicdiff import PruneConfig
from mosaicdiff.pipeline import calibrate
from mosaicdiff.sources import find_denoiser, load_pipeline


@dataclass(frozen=True)
class Layer:
    """A layer to prune: weight (m, n), H (n, n), and how many columns go together."""

    name: str
    weight: Tensor
    h: Tensor
    group_size: int


def correlated_layer(
    m: int, n: int, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return (weight, H), float32, of correlated channels of uneven size, as activations are."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x = (
        random(2 * n, n)
        * (0.2 + random(n).abs())
        @ (random(n, n) / n**0.5 + torch.eye(n, device=device))
    )
    return random(m, n), x.T @ x / x.shape[0]


def conditioned_layer(
    m: int, n: int, condition: float = 1e8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return (weight, H), float64, with eigenvalues of H from 1 down to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    exponents = torch.linspace(0, 1, n, dtype=torch.float64)
    h = basis * condition**-exponents @ basis.T
    return torch.randn(m, n, generator=generator, dtype=torch.float64), (h + h.T) / 2


def layer_error(weight: Tensor, fitted: Tensor, h: Tensor, kept: Tensor) -> float:
    """Return trace(D H D^T) / trace(W H W^T) in float64, D = W - W'."""
    wide, hessian = weight.double(), h.double()
    change = wide.clone()
    change[:, kept] -= fitted.double()
    return float(((change @ hessian) * change).sum() / ((wide @ hessian) * wide).sum())


def embedded_layers(samples: int = 256, stages: int = 3) -> list[Layer]:
    """Return the readers of the embedded model with their H in each stage, float32."""
    pipe = load_pipeline("digits")
    _, denoiser = find_denoiser(pipe)
    measured = calibrate(pipe, PruneConfig(samples=samples, stages=stages))
    result = []
    for stage, statistics in zip(measured.division.stages, measured.statistics, strict=True):
        for layer in measured.layers:
            reader = layer.readers[0]
            weight = reader.of_weight(denoiser.get_submodule(reader.module).weight.detach())
            h = statistics[reader.name].unpack(weight.device).hessian
            result.append(Layer(f"{stage.name}: {reader.name}", weight, h, layer.width))
    return result
