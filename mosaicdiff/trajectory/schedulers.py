"""What diffusers' schedulers say of noise levels: their train schedule, and that of a run.

Three families are told apart by their configuration:

- *flow matching*: x = (1 - sigma) x_0 + sigma eps. The `FlowMatch` classes, and whatever has
  `use_flow_sigmas`. A timestep is called T sigma; T (1 - sigma) with `invert_sigmas` (Mochi).
- *EDM*: the denoiser sees (x_0 + sigma eps) / sqrt(sigma^2 + sigma_data^2), and its timestep is
  ln(sigma) / 4. Those with `sigma_data` and a `precondition_noise`.
- *variance preserving*: x = sqrt(abar) x_0 + sqrt(1 - abar) eps. All else with `alphas_cumprod`;
  where a scheduler keeps sigmas, they are sqrt((1 - abar) / abar). A timestep is called by its
  number, or ln(sigma) / 4 with `timestep_type="continuous"`.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

#: What a scheduler calls a train timestep: number from 0, T sigma, T (1 - sigma), ln(sigma) / 4.
NAMINGS = ("number", "sigma", "inverted", "log_sigma")

_FLOW_CLASSES = ("FlowMatch", "EulerAncestralRF")


@dataclass(frozen=True)
class Levels:
    """The noise levels of a train schedule, rising in noise.

    Args:
        signal: (T,) float64, what the denoiser sees of x_0.
        noise: (T,) float64, what it sees of the noise.
        timesteps: (T,) what the scheduler calls each.
        naming: one of `NAMINGS`.
        usual_power: P of data that the schedule is made for.
        flow: whether of flow matching.
    """

    signal: np.ndarray
    noise: np.ndarray
    timesteps: np.ndarray
    naming: str = "number"
    usual_power: float = 1.0
    flow: bool = False


@dataclass(frozen=True)
class Sampling:
    """How a pipeline starts its sampler, as far as that moves the steps.

    Args:
        tokens: that the latents have in the denoiser; a shift that depends on the resolution is
            worked out from them. None where that is not known.
        passes_sigmas: whether the pipeline hands over the sigmas 1, ..., 1/N itself.
        empirical: whether the shift follows FLUX.2's fit to tokens and steps.
    """

    tokens: int | None = None
    passes_sigmas: bool = False
    empirical: bool = False


def is_flow(scheduler: Any) -> bool:
    """Tell whether a scheduler samples by flow matching."""
    config = getattr(scheduler, "config", {})
    return (
        is_flow_class(scheduler)
        or bool(config.get("use_flow_sigmas", False))
        or config.get("prediction_type") == "flow_prediction"
    )


def is_flow_class(scheduler: Any) -> bool:
    """Tell whether a scheduler's class is of flow matching; such keep their sigmas where asked."""
    return any(name in type(scheduler).__name__ for name in _FLOW_CLASSES)


def is_edm(scheduler: Any) -> bool:
    """Tell whether a scheduler samples as EDM does (Karras et al., arXiv 2206.00364)."""
    known = "sigma_data" in getattr(scheduler, "config", {})
    return known and hasattr(scheduler, "precondition_noise")


def train_levels(scheduler: Any) -> Levels:
    """Read the train schedule of a scheduler from its configuration; a run does not change it.

    Of the variance-preserving family its `alphas_cumprod`. Of flow matching the sigmas k / T for
    k = 1..T with the static shift s: s sigma / (1 + (s - 1) sigma); a shift that depends on the
    resolution moves the sampler's steps only, so there s is 1. Of EDM T sigmas between
    `sigma_min` and `sigma_max` along its own ramp.

    Raises:
        ValueError: the scheduler gives no signal-to-noise ratio that this version knows.
    """
    if is_flow(scheduler):
        return _flow_levels(scheduler)
    if is_edm(scheduler):
        return _edm_levels(scheduler)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise ValueError(
            "NoiseSchedule: scheduler must be variance preserving (one with alphas_cumprod: DDIM, "
            "DDPM, DPM-Solver++, UniPC, Euler, Heun, ...), flow matching, or EDM with sigma_data, "
            f"got {type(scheduler).__name__}, which gives no signal-to-noise ratio by train "
            "timestep. Plan with one of these that samples the same model."
        )
    levels = alpha_levels(alphas.detach().cpu())
    if getattr(scheduler, "config", {}).get("timestep_type") != "continuous":
        return levels
    sigma = np.maximum(levels.noise, 1e-12) / np.maximum(levels.signal, 1e-12)
    return replace(levels, timesteps=np.log(sigma) / 4, naming="log_sigma")


def alpha_levels(alphas_cumprod: Any) -> Levels:
    """Return variance-preserving levels: signal sqrt(abar), noise sqrt(1 - abar).

    Raises:
        ValueError: the numbers are no falling row in [0, 1].
    """
    abar = np.asarray(alphas_cumprod, dtype=np.float64)
    if abar.ndim != 1 or len(abar) < 2:
        raise ValueError(
            "NoiseSchedule: alphas_cumprod must be one row of at least 2 numbers, "
            f"got shape {abar.shape}."
        )
    if not (np.isfinite(abar).all() and (abar >= 0).all() and (abar <= 1).all()):
        raise ValueError("NoiseSchedule: alphas_cumprod must lie in [0, 1].")
    if (np.diff(abar) >= 0).any():
        raise ValueError("NoiseSchedule: alphas_cumprod must fall from step to step.")
    return Levels(np.sqrt(abar), np.sqrt(1 - abar), np.arange(len(abar)))


def flow_levels(sigmas: Any) -> Levels:
    """Return the levels of flow matching: signal 1 - sigma, noise sigma, timestep T sigma.

    Raises:
        ValueError: the sigmas do not rise within (0, 1].
    """
    sigma = np.asarray(sigmas, dtype=np.float64)
    if sigma.ndim != 1 or len(sigma) < 2:
        raise ValueError(
            f"NoiseSchedule: sigmas must be one row of at least 2 numbers, got shape {sigma.shape}."
        )
    if not ((sigma > 0).all() and (sigma <= 1).all() and (np.diff(sigma) > 0).all()):
        raise ValueError("NoiseSchedule: sigmas must rise from step to step within (0, 1].")
    return Levels(1 - sigma, sigma, len(sigma) * sigma, "sigma", flow=True)


def _flow_levels(scheduler: Any) -> Levels:
    config, named = scheduler.config, is_flow_class(scheduler)
    if not (named or config.get("use_flow_sigmas")):
        raise ValueError(
            "NoiseSchedule: scheduler of flow matching must be one of diffusers' FlowMatch "
            f"classes, or have use_flow_sigmas, got {type(scheduler).__name__} without. Set "
            "use_flow_sigmas=True."
        )
    total = config["num_train_timesteps"]
    shift = config.get("shift" if named else "flow_shift") or 1.0
    if config.get("use_dynamic_shifting"):
        shift = 1.0
    sigma = np.arange(1, total + 1) / total
    levels = flow_levels(shift * sigma / (1 + (shift - 1) * sigma))
    if config.get("invert_sigmas"):
        return replace(levels, timesteps=total * levels.signal, naming="inverted")
    return levels


def _edm_levels(scheduler: Any) -> Levels:
    config = scheduler.config
    ramp = np.linspace(0, 1, config["num_train_timesteps"])
    low, high = config["sigma_min"], config["sigma_max"]
    if config.get("sigma_schedule", "exponential") == "karras":
        root = 1 / config["rho"]
        sigma = (low**root + ramp * (high**root - low**root)) ** config["rho"]
    else:
        sigma = np.exp(np.log(low) + ramp * (np.log(high) - np.log(low)))
    data = float(config["sigma_data"])
    scale = 1 / np.sqrt(sigma**2 + data**2)
    return Levels(scale, sigma * scale, np.log(sigma) / 4, "log_sigma", data**2)


def step_levels(scheduler: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return (signal, noise) up to a factor at every entry of `scheduler.timesteps`.

    To be called after `set_timesteps`. The sigmas are trusted where there are any: some
    schedulers round their timesteps. Reads tensors that the schedulers keep on the CPU.

    Raises:
        ValueError: as `train_levels`.
    """
    count = len(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        levels = train_levels(scheduler)
        index = np.asarray(scheduler.timesteps.cpu(), dtype=np.int64)
        return levels.signal[index], levels.noise[index]
    sigma = np.array(sigmas.cpu(), dtype=np.float64)[:count]
    between = getattr(scheduler, "sigmas_interpol", None)
    if between is not None:
        # The second call of a KDPM2 step is made between two sigmas; the ancestral one keeps
        # what that call sees one place earlier.
        ahead = 0 if "Ancestral" in type(scheduler).__name__ else 1
        middle = np.asarray(between.cpu(), dtype=np.float64)
        sigma[1::2] = middle[ahead : ahead + count - 1 : 2]
    if not is_flow(scheduler):
        return np.ones_like(sigma), sigma
    sigma = np.clip(sigma, 0.0, 1.0)
    inverted = getattr(scheduler, "config", {}).get("invert_sigmas")
    return (sigma, 1 - sigma) if inverted else (1 - sigma, sigma)


def named_levels(naming: str, timestep: float, total: int) -> tuple[float, float]:
    """Return (signal, noise) up to a factor of what a scheduler calls `timestep`.

    Args:
        naming: of `NAMINGS`, but a number, which says nothing without its schedule.
        total: T.
    """
    if naming == "log_sigma":
        return 1.0, math.exp(4 * timestep)
    part = min(max(timestep / total, 0.0), 1.0)
    return (part, 1 - part) if naming == "inverted" else (1 - part, part)


def start_steps(scheduler: Any, steps: int, sampling: Sampling | None = None) -> None:
    """Call `set_timesteps` of a sampler that is the caller's own, as the pipelines do.

    Where the shift depends on the resolution, mu is linear in the tokens between
    (`base_image_seq_len`, `base_shift`) and (`max_image_seq_len`, `max_shift`) of the scheduler,
    or FLUX.2's.

    Raises:
        ValueError: the shift depends on the resolution, and the tokens are not known.
    """
    sampling = sampling or Sampling()
    config = getattr(scheduler, "config", {})
    takes = inspect.signature(scheduler.set_timesteps).parameters
    given: dict[str, Any] = {}
    if config.get("use_dynamic_shifting"):
        if sampling.tokens is None:
            raise ValueError(
                "prune: tokens must be known for a scheduler with use_dynamic_shifting, whose "
                "steps depend on the resolution, got none. Say how many an image has "
                "(--tokens), give the pipeline or its denoiser, or a scheduler with "
                "use_dynamic_shifting=False and the shift of your size."
            )
        given["mu"] = shift_of(config, steps, sampling)
    if sampling.passes_sigmas and "sigmas" in takes and is_flow(scheduler):
        given["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(steps, **given)


def shift_of(config: Any, steps: int, sampling: Sampling) -> float:
    """Return mu as the pipelines work it out; see `start_steps`."""
    tokens = sampling.tokens or 0
    if sampling.empirical:
        return _empirical_shift(tokens, steps)
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - first) / (last - first)


def _empirical_shift(tokens: int, steps: int) -> float:
    """Return FLUX.2's mu: lines in the tokens at 10 and at 200 steps, linear in the steps between.

    Source: the constants of diffusers' Flux2Pipeline, fitted by Black Forest Labs.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_10 - at_200) * (200 - steps) / 190
