"""How much the denoiser's output depends on the output of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter
from ..config import PruneConfig
from ..groups import Denoiser, PrunableLayer
from ..trajectory.probe import Probe
from ..trajectory.schedule import NoiseSchedule
from ..trajectory.stages import Stage
from .noising import CalibrationSet, draw_noisy

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
    """Return, for each stage and reader, what its squared error adds to that of the output.

    With r standard normal, g = d (r . output) / d (reader output): E[g^2] is the sum over the
    output of the squared derivatives, so that an error of the reader, uncorrelated with them,
    adds E[g^2] times its square to the squared error of the output. The weight takes a reader's
    error as curves have it (summed over channels, mean over tokens) to the mean over the
    output's elements. One backward pass a batch.

    Source: ours; after the Hutchinson estimator.
    """
    weights = []
    config = replace(config, batch_size=min(_BATCH, config.rows_at_once))
    for stage in stages:
        sums = dict.fromkeys((name for layer in layers for name in layer.input_names), 0.0)
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
                    squares = float(gradient.double().square().sum())
                    sums[name] += squares / gradient.shape[-1]  # channels
                    counts[name] += result.numel()
        weights.append({name: sums[name] / max(1, counts[name]) for name in sums})
    return weights


def stage_gains(probe: Probe, denoiser: nn.Module, steps: Sequence[int]) -> list[float]:
    """Return, for each stage, how much noise in its outputs tells in the final latents.

    White noise of a small amplitude, the same at every step of the stage, is added to the dense
    denoiser's output: a pruned layer errs in much the same way from step to step, so that its
    errors add up. The gain is the error of the final latents (`Probe.error`), for one step, over
    the square of the amplitude. Half a sampling run a stage, about.

    Source: ours.
    """
    gains, before = [], probe.start()
    for stage, count in enumerate(steps):
        disturbed = probe.advance(before, _Noisy(denoiser, stage), count)
        rest = sum(steps[stage + 1 :])
        gains.append(probe.error(probe.advance(disturbed, denoiser, rest)) / _AMPLITUDE**2 / count)
        before = probe.advance(before, denoiser, count)
    return gains


class _Noisy:
    """A denoiser whose output carries white noise, the same at every call."""

    def __init__(self, denoiser: Denoiser, seed: int) -> None:
        self.config = denoiser.config  # adapters read it
        self._denoiser, self._generator = denoiser, torch.Generator().manual_seed(seed)
        self._noise: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._denoiser(*args, **kwargs)
        if self._noise is None:
            self._noise = torch.randn(output.sample.shape, generator=self._generator)
        output.sample = output.sample + _AMPLITUDE * self._noise.to(output.sample)
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
        for reader in (reader for layer in layers for reader in layer.readers):

            def keep(module: nn.Module, args: tuple, output: torch.Tensor, name: str = reader.name):
                held[name] = output

            handle = denoiser.get_submodule(reader.module).register_forward_hook(keep)
            stack.callback(handle.remove)
        # Parameters need no gradient; something must, for a graph to be built.
        result = adapter.predict(denoiser, latents.requires_grad_(), timesteps, inputs)
    return result, held
