"""Run a sampler on latents, stage by stage, so that networks can be compared on one trajectory."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter
from ..groups import leading_parameter
from ..statistics.capture import evaluating
from ..statistics.noising import CalibrationSet
from .schedulers import Sampling, start_steps
from .span import Span
from .stages import Division

#: Keeps the noise of measurements apart from that of calibration.
_SEED_OFFSET = 77_777_777


@dataclass(frozen=True)
class RunState:
    """A sampler between two steps.

    Args:
        latents: (B, *shape of a sample).
        scheduler: with its own memory of earlier steps; never changed in place.
        step: that comes next.
        visited: latents after each step so far, where they are kept.
    """

    latents: torch.Tensor
    scheduler: Any
    step: int
    visited: tuple[torch.Tensor, ...] = ()


class Probe:
    """A fixed set of noises and conditions, sampled without guidance by any networks.

    Args:
        denoiser: the dense one.
        adapter: of the denoiser.
        scheduler: of the plan; copied.
        data: whose conditions are used, in order drawn by the seed.
        steps: of the sampler.
        samples: how many.
        seed: of noise and conditions.
        sampling: how the pipeline starts its sampler.
        span: the timesteps that the denoiser is called at, where the pipeline has two: the run
            begins where it takes over, and ends where it hands over.
        partner: the pipeline's other denoiser, dense, which makes the steps before.

    Raises:
        ValueError: there are steps before, and no partner.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        adapter: Adapter,
        scheduler: Any,
        data: CalibrationSet,
        *,
        steps: int,
        samples: int,
        seed: int,
        sampling: Sampling | None = None,
        span: Span | None = None,
        partner: nn.Module | None = None,
    ) -> None:
        parameter = leading_parameter(denoiser)
        self._device, self._dtype = parameter.device, parameter.dtype
        self._adapter, self._denoiser, self._seed = adapter, denoiser, seed
        self._scheduler = type(scheduler).from_config(scheduler.config)
        start_steps(self._scheduler, steps, sampling)
        self._timesteps = self._scheduler.timesteps
        mine = (span or Span()).holds(self._timesteps.cpu()).nonzero()[0]
        self._first, self._count = int(mine[0]), len(mine)
        if self._first > 0 and partner is None:
            raise ValueError(
                f"prune: pipeline must hold the denoiser of the first {self._first} steps too, "
                "got only the one that goes on from there. What is measured by sampling starts "
                "from noise: use weighting='sensitivity' (--weighting sensitivity), or give the "
                "whole pipeline."
            )
        self._partner = partner
        generator = torch.Generator().manual_seed(_SEED_OFFSET + seed)
        latents, inputs = next(iter(data.draw(samples, samples, generator)))
        self._noise = torch.randn(latents.shape, generator=generator)
        self._inputs = {key: value.to(self._device) for key, value in inputs.items()}
        self._dense: RunState | None = None
        self._started: RunState | None = None

    def __len__(self) -> int:
        return self._count

    def start(self) -> RunState:
        """Return the state before the first step that the denoiser makes."""
        if self._started is None:
            state = self._noise_state()
            if self._partner is not None and self._first > 0:
                state = self.advance(state, self._partner, self._first)
            self._started = state
        return self._started

    def _noise_state(self) -> RunState:
        sigma = float(getattr(self._scheduler, "init_noise_sigma", 1.0))
        latents = (self._noise * sigma).to(self._device, self._dtype)
        return RunState(latents, copy.deepcopy(self._scheduler), 0)

    @torch.no_grad()
    def advance(self, state: RunState, network: Any, count: int, visit: bool = False) -> RunState:
        """Take `count` steps with one network; the state given stays as it is."""
        # In training a denoiser may drop labels at random.
        with evaluating(self._denoiser):
            if isinstance(network, nn.Module):
                network.eval()
            return self._advance(state, network, count, visit)

    def _advance(self, state: RunState, network: Any, count: int, visit: bool) -> RunState:
        scheduler = copy.deepcopy(state.scheduler)
        takes = inspect.signature(scheduler.step).parameters
        latents, visited = state.latents, list(state.visited)
        for index in range(state.step, state.step + count):
            t = self._timesteps[index]
            extra = {}
            if "generator" in takes:  # a sampler that adds noise adds the same to every network
                seed = _SEED_OFFSET + self._seed * len(self) + index
                extra["generator"] = torch.Generator(self._device).manual_seed(seed)
            scaled = latents
            if hasattr(scheduler, "scale_model_input"):  # flow matching has none
                scaled = scheduler.scale_model_input(latents, t)
            step = t.expand(len(latents)).to(self._device)
            noise = self._adapter.predict(network, scaled, step, self._inputs)
            latents = scheduler.step(noise, t, latents, **extra).prev_sample
            if visit:
                visited.append(latents)
        return replace(
            state,
            latents=latents,
            scheduler=scheduler,
            step=state.step + count,
            visited=tuple(visited),
        )

    def run(self, networks: Sequence[Any], steps: Sequence[int], visit: bool = False) -> RunState:
        """Sample with one network a stage, each for so many steps."""
        state = self.start()
        for network, count in zip(networks, steps, strict=True):
            state = self.advance(state, network, count, visit)
        return state

    def dense(self, visit: bool = False) -> RunState:
        """Return the dense denoiser's run, made once."""
        if self._dense is None or (visit and not self._dense.visited):
            self._dense = self.run([self._denoiser], [len(self)], visit)
        return self._dense

    def error(self, state: RunState) -> float:
        """Return the mean squared error of final latents to the dense run's, over their energy."""
        return latent_error(state.latents, self.dense().latents)


def latent_error(latents: torch.Tensor, dense: torch.Tensor) -> float:
    """Return the mean of (latents - dense)^2 over the mean of dense^2, in float64."""
    wrong = (latents.double() - dense.double()).square().mean()
    return float(wrong / dense.double().square().mean())


def steps_in_order(division: Division, visited: Any) -> bool:
    """Tell whether a sampler goes through the stages from the noisiest without return."""
    found = list(division.stage_of_log_snr(visited))
    return found == sorted(found)
