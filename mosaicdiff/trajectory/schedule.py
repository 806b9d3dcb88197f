"""Noise schedules as numbers, and the closed-form score of their steps.

Train timesteps here are diffusers': 0 is the least noisy. The formulas of the papers count from
1, so their t is `timestep + 1`. With flow matching train timestep k is the one of
sigma = shift((k + 1) / T); a scheduler names it by T sigma, which `NoiseSchedule.timesteps` holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

#: ln SNR is clamped to this range: it is infinite at zero terminal SNR.
LOG_SNR_LIMIT = 14.0

NAMED_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class NoiseSchedule:
    """Hold x_t = signal_t x_0 + noise_t eps for every train timestep.

    Args:
        signal: (T,) float64.
        noise: (T,) float64.
        timesteps: (T,) what a scheduler calls each of them, ascending: int64 0..T-1 (the default),
            or float64.

    Source: MosaicDiff (arXiv 2510.11962); the normalisation of the score is ours.
    """

    signal: np.ndarray
    noise: np.ndarray
    timesteps: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.timesteps is None:
            object.__setattr__(self, "timesteps", np.arange(len(self.signal)))

    def __len__(self) -> int:
        return len(self.signal)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Any) -> NoiseSchedule:
        """Build the variance-preserving schedule: signal sqrt(abar), noise sqrt(1 - abar)."""
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
        return cls(np.sqrt(abar), np.sqrt(1 - abar))

    @classmethod
    def named(cls, name: str, timesteps: int = 1000) -> NoiseSchedule:
        """Build one of diffusers' beta schedules with its usual range, in float64."""
        if name == "linear":
            betas = np.linspace(1e-4, 0.02, timesteps)
        elif name == "scaled_linear":
            betas = np.linspace(0.00085**0.5, 0.012**0.5, timesteps) ** 2
        elif name == "squaredcos_cap_v2":
            edges = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
        else:
            raise ValueError(
                f"NoiseSchedule: name must be one of {', '.join(NAMED_SCHEDULES)}, got {name!r}."
            )
        return cls.from_alphas_cumprod(np.cumprod(1 - betas))

    @classmethod
    def from_sigmas(cls, sigmas: Any) -> NoiseSchedule:
        """Build the schedule of flow matching: signal 1 - sigma, noise sigma, timestep T sigma.

        Args:
            sigmas: (T,) rising, in (0, 1]. At 1 there is no signal, and ln SNR is clamped.
        """
        sigma = np.asarray(sigmas, dtype=np.float64)
        if sigma.ndim != 1 or len(sigma) < 2:
            raise ValueError(
                "NoiseSchedule: sigmas must be one row of at least 2 numbers, "
                f"got shape {sigma.shape}."
            )
        if not ((sigma > 0).all() and (sigma <= 1).all() and (np.diff(sigma) > 0).all()):
            raise ValueError("NoiseSchedule: sigmas must rise from step to step within (0, 1].")
        return cls(1 - sigma, sigma, len(sigma) * sigma)

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """Read the train schedule of a diffusers scheduler from its configuration.

        Of the variance-preserving family its `alphas_cumprod`. Of flow matching the sigmas
        k / T for k = 1..T with the static shift s: s sigma / (1 + (s - 1) sigma). That is what
        diffusers' FlowMatch schedulers hold before `set_timesteps`; a shift that depends on the
        resolution moves the sampler's steps only, so there s is 1.

        Raises:
            ValueError: the scheduler gives no signal-to-noise ratio that this version knows.
        """
        if is_flow(scheduler):
            return cls.from_sigmas(_flow_sigmas(scheduler))
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None:
            raise ValueError(
                "NoiseSchedule: scheduler must be variance preserving (one with alphas_cumprod: "
                "DDIM, DDPM, DPM-Solver++, UniPC, Euler, Heun, ...) or flow matching, got "
                f"{type(scheduler).__name__}, which gives no signal-to-noise ratio by train "
                "timestep. EDM schedulers are not supported yet."
            )
        return cls.from_alphas_cumprod(alphas.detach().cpu().numpy())

    def index_of(self, timesteps: Any) -> np.ndarray:
        """Return train timesteps (fractions between two) by what a scheduler calls them."""
        return np.interp(np.asarray(timesteps, np.float64), self.timesteps, np.arange(len(self)))

    @property
    def log_snr(self) -> np.ndarray:
        """ln(signal^2 / noise^2), clamped, (T,)."""
        return log_snr(self.signal, self.noise)

    def expected_mse(self, power: float = 1.0) -> np.ndarray:
        """E[MSE(t)] = (1 - signal_t)^2 P + noise_t^2, (T,)."""
        return (1 - self.signal) ** 2 * power + self.noise**2

    def expected_gradient(self, power: float = 1.0) -> np.ndarray:
        """E[Grad(t)] = E[MSE(t)] - E[MSE(t-1)], (T,); before the first step nothing is lost."""
        return np.diff(self.expected_mse(power), prepend=0.0)

    def score(self, power: float = 1.0, snr_weight: float = 0.01) -> np.ndarray:
        """score(t) = E[Grad(t)] / max E[Grad] + lambda ln SNR(t), (T,).

        Args:
            power: P, the mean square of the clean latents.
            snr_weight: lambda.
        """
        gradient = self.expected_gradient(power)
        return gradient / gradient.max() + snr_weight * self.log_snr


def log_snr(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return ln(signal^2 / noise^2) clamped to +-LOG_SNR_LIMIT."""
    with np.errstate(divide="ignore"):
        ratio = 2 * (np.log(signal) - np.log(noise))
    return np.clip(ratio, -LOG_SNR_LIMIT, LOG_SNR_LIMIT)


def is_flow(scheduler: Any) -> bool:
    """Tell whether a scheduler samples by flow matching."""
    config = getattr(scheduler, "config", {})
    return (
        "FlowMatch" in type(scheduler).__name__
        or bool(config.get("use_flow_sigmas", False))
        or config.get("prediction_type") == "flow_prediction"
    )


def _flow_sigmas(scheduler: Any) -> np.ndarray:
    """Return the train sigmas of a flow-matching scheduler, rising."""
    config = scheduler.config
    named = "FlowMatch" in type(scheduler).__name__
    if not (named or config.get("use_flow_sigmas")) or config.get("invert_sigmas"):
        raise ValueError(
            "NoiseSchedule: scheduler of flow matching must be one of diffusers' FlowMatch "
            "classes, or have use_flow_sigmas, and not invert its sigmas, got "
            f"{type(scheduler).__name__}."
        )
    total = config["num_train_timesteps"]
    shift = config.get("shift" if named else "flow_shift") or 1.0
    if config.get("use_dynamic_shifting"):
        shift = 1.0
    sigma = np.arange(1, total + 1) / total
    return shift * sigma / (1 + (shift - 1) * sigma)


def start_steps(scheduler: Any, steps: int) -> None:
    """Call `set_timesteps` of a sampler that is the caller's own.

    Raises:
        ValueError: its steps depend on the resolution.
    """
    if getattr(scheduler, "config", {}).get("use_dynamic_shifting"):
        raise ValueError(
            "prune: scheduler must have one shift for every resolution, but use_dynamic_shifting "
            "is set. Give a copy with use_dynamic_shifting=False and the shift of the size you "
            "sample at."
        )
    scheduler.set_timesteps(steps)


def step_log_snr(scheduler: Any) -> np.ndarray:
    """Return ln SNR of every entry of `scheduler.timesteps`, after `set_timesteps`.

    The sigmas are trusted where there are any (some schedulers round their timesteps): SNR is
    ((1 - sigma) / sigma)^2 with flow matching, 1 / sigma^2 otherwise. Without sigmas the timesteps
    index the train schedule. Reads tensors that the schedulers keep on the CPU.
    """
    timesteps = scheduler.timesteps
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        sigma = np.asarray(sigmas.cpu(), dtype=np.float64)[: len(timesteps)]
        return flow_log_snr(sigma) if is_flow(scheduler) else log_snr(np.ones_like(sigma), sigma)
    index = np.asarray(timesteps.cpu(), dtype=np.int64)
    return NoiseSchedule.from_scheduler(scheduler).log_snr[index]


def flow_log_snr(sigma: Any) -> np.ndarray:
    """Return ln ((1 - sigma) / sigma)^2, clamped; sigma is taken into [0, 1]."""
    sigma = np.clip(np.asarray(sigma, dtype=np.float64), 0.0, 1.0)
    return log_snr(1 - sigma, sigma)
