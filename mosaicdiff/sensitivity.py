"""How much the denoiser's output depends on the output of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .adapters import Adapter
from .calibrate import CalibrationSet, draw_noisy
from .config import PruneConfig
from .groups import PrunableLayer
from .schedule import NoiseSchedule
from .stages import Stage
from .trajectory import Probe

#: Of the noise that `stage_gains` adds to outputs of unit variance.
_AMPLITUDE = 0.02
#: Samples of a stage that its gradients are taken over, and of a batch, at most: a graph of the
#: whole denoiser is held for a batch.
_SAMPLES, _BATCH = 64, 8
#: Samples that `stage_gains` is meant for: noise in every latent, so that few say enough.
GAIN_SAMPLES = 8


def measure_weights(
    denoiser: nn.Module,
    adapter: Adapter,
    layers: Sequence[PrunableLayer],
    stages: Sequence[Stage],
    schedule: NoiseSchedule,
    data: CalibrationSet,
    config: PruneConfig,
) -> list[dict[str, float]]:
    """Return, for each stage and layer, the mean squared gradient of a projection of the output.

    With r standard normal, g = d (r . output) / d (layer output): E[g^2] is the sum over the
    output of the squared derivatives, so that an error of the layer, uncorrelated with them,
    adds E[g^2] times its square to the squared error of the output. One backward pass a batch.

    Source: ours; after the Hutchinson estimator.
    """
    weights = []
    config = replace(config, batch_size=min(_BATCH, config.batch_size))
    for stage in stages:
        sums = dict.fromkeys((layer.name for layer in layers), 0.0)
        counts = dict.fromkeys(sums, 0)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + stage.first + 1)
        samples = min(_SAMPLES, config.samples)
        batches = draw_noisy(
            denoiser, adapter, stage, schedule, data, config, generator, samples=samples
        )
        for latents, timesteps, inputs in batches:
            outputs = _run_with_gradient(denoiser, adapter, layers, latents, timesteps, inputs)
            result, held = outputs
            direction = torch.randn(result.shape, generator=generator)
            gradients = torch.autograd.grad(
                result, list(held.values()), direction.to(result), allow_unused=True
            )
            for name, gradient in zip(held, gradients, strict=True):
                if gradient is not None:
                    sums[name] += float(gradient.double().square().sum())
                    counts[name] += gradient.numel()
        weights.append({name: sums[name] / max(1, counts[name]) for name in sums})
    return weights


def stage_gains(probe: Probe, denoiser: nn.Module, steps: Sequence[int]) -> list[float]:
    """Return, for each stage, how much noise in its outputs tells in the final latents.

    White noise of a small amplitude is added to the dense denoiser's output at the stage's
    steps; the gain is the error of the final latents (`Probe.error`), for one step, over the
    square of the amplitude. One sampling run a stage.

    Source: ours.
    """
    gains = []
    for stage, count in enumerate(steps):
        state = probe.start()
        for k, span in enumerate(steps):
            network: Any = _Noisy(denoiser, stage) if k == stage else denoiser
            state = probe.advance(state, network, span)
        gains.append(probe.error(state) / _AMPLITUDE**2 / count)
    return gains


class _Noisy:
    """A denoiser whose output carries white noise of a fixed seed."""

    def __init__(self, denoiser: nn.Module, seed: int) -> None:
        self._denoiser, self._generator = denoiser, torch.Generator().manual_seed(seed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._denoiser(*args, **kwargs)
        noise = torch.randn(output.sample.shape, generator=self._generator)
        output.sample = output.sample + _AMPLITUDE * noise.to(output.sample)
        return output


def _run_with_gradient(
    denoiser: nn.Module,
    adapter: Adapter,
    layers: Sequence[PrunableLayer],
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    inputs: dict,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    held: dict[str, torch.Tensor] = {}
    with ExitStack() as stack, torch.enable_grad():
        for layer in layers:

            def keep(module: nn.Module, args: tuple, output: torch.Tensor, name: str = layer.name):
                held[name] = output

            handle = denoiser.get_submodule(layer.reader).register_forward_hook(keep)
            stack.callback(handle.remove)
        # Parameters need no gradient; something must, for a graph to be built.
        result = adapter.predict(denoiser, latents.requires_grad_(), timesteps, inputs)
    return result, held
