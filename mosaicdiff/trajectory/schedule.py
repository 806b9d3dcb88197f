"""Noise schedules as numbers, and the closed-form score of their steps.

Train timesteps here are diffusers': 0 is the least noisy. The formulas of the papers count from
1, so their t is `timestep + 1`. What a scheduler calls a train timestep may differ from its number
(T sigma with flow matching, ln(sigma) / 4 with EDM): `NoiseSchedule.timesteps` holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .schedulers import Levels, alpha_levels, flow_levels, step_levels, train_levels

#: ln SNR is clamped to this range: it is infinite at zero terminal SNR.
LOG_SNR_LIMIT = 14.0

#: M and lambda where none are given.
THRESHOLD, SNR_WEIGHT = 0.55, 0.01
#: Of flow matching: the middle stage lies at sigma 0.303..0.861, whatever P and the shift. With
#: `digits` retrained (benchmarks.bench_flow rules), 30% by `optimal` at 25 steps and shift 1 left
#: a squared error of 0.0033 of the energy so; 0.0044 with lambda 0, 0.0078 by timestep with the
#: values above (which makes no early stage), 0.0050 in thirds of sigma, 0.0090 in one network.
#: What the model knows of x_0 agrees: its squared error stays at 0.5 down to sigma 0.86, where it
#: begins to fall. lambda must stay under 0.06 without a shift: above, ln SNR at the clean end
#: makes the largest score, and nothing is left to divide.
FLOW_THRESHOLD, FLOW_SNR_WEIGHT = 0.55, 0.05

NAMED_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "flow")


@dataclass(frozen=True)
class NoiseSchedule:
    """Hold x_t = signal_t x_0 + noise_t eps for every train timestep.

    Args:
        signal: (T,) float64.
        noise: (T,) float64.
        timesteps: (T,) what a scheduler calls each of them: int64 0..T-1 (the default), or
            float64.
        naming: how it calls them, one of `schedulers.NAMINGS`.
        usual_power: P of data that the schedule is made for: 1, or sigma_data^2 with EDM, whose
            denoisers see x_0 / sigma_data where there is no noise.
        flow: whether of flow matching.

    Source: MosaicDiff (arXiv 2510.11962); the normalisation of the score is ours.
    """

    signal: np.ndarray
    noise: np.ndarray
    timesteps: np.ndarray = None  # type: ignore[assignment]
    naming: str = "number"
    usual_power: float = 1.0
    flow: bool = False

    def __post_init__(self) -> None:
        if self.timesteps is None:
            object.__setattr__(self, "timesteps", np.arange(len(self.signal)))

    def __len__(self) -> int:
        return len(self.signal)

    @classmethod
    def _of(cls, levels: Levels) -> NoiseSchedule:
        return cls(
            levels.signal, levels.noise, levels.timesteps, levels.naming, levels.usual_power,
            levels.flow,
        )  # fmt: skip

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Any) -> NoiseSchedule:
        """Build the variance-preserving schedule: signal sqrt(abar), noise sqrt(1 - abar)."""
        return cls._of(alpha_levels(alphas_cumprod))

    @classmethod
    def named(cls, name: str, timesteps: int = 1000) -> NoiseSchedule:
        """Build one of diffusers' beta schedules with its usual range, or `flow`, in float64.

        `flow` is that of flow matching without a shift.
        """
        if name == "linear":
            betas = np.linspace(1e-4, 0.02, timesteps)
        elif name == "scaled_linear":
            betas = np.linspace(0.00085**0.5, 0.012**0.5, timesteps) ** 2
        elif name == "squaredcos_cap_v2":
            edges = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
        elif name == "flow":
            return cls.from_sigmas(np.arange(1, timesteps + 1) / timesteps)
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
        return cls._of(flow_levels(sigmas))

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """Read the train schedule of a diffusers scheduler; see `schedulers.train_levels`.

        Raises:
            ValueError: the scheduler gives no signal-to-noise ratio that this version knows.
        """
        return cls._of(train_levels(scheduler))

    def index_of(self, timesteps: Any) -> np.ndarray:
        """Return train timesteps (fractions between two) by what a scheduler calls them."""
        order = np.argsort(self.timesteps, kind="stable")
        given = np.asarray(timesteps, np.float64)
        return np.interp(given, self.timesteps[order], np.arange(len(self))[order].astype(float))

    def index_of_log_snr(self, log_snr: Any) -> np.ndarray:
        """Return train timesteps (fractions between two) by their ln SNR."""
        index = np.interp(-np.asarray(log_snr), -self.log_snr, np.arange(len(self), dtype=float))
        return index.round(3)  # sampled levels are rounded themselves, most to float32

    @property
    def log_snr(self) -> np.ndarray:
        """ln(signal^2 / noise^2), clamped, (T,)."""
        return log_snr(self.signal, self.noise)

    def expected_mse(self, power: float | None = None) -> np.ndarray:
        """E[MSE(t)] = (1 - signal_t)^2 P + noise_t^2, (T,).

        Where the usual power p is not 1 (EDM), x_0 is measured in sqrt(p), as the denoiser sees
        it: (1 - sqrt(p) signal_t)^2 P / p + noise_t^2.
        """
        unit = self.usual_power
        given = unit if power is None else power
        return (1 - unit**0.5 * self.signal) ** 2 * given / unit + self.noise**2

    def expected_gradient(self, power: float | None = None) -> np.ndarray:
        """E[Grad(t)] = E[MSE(t)] - E[MSE(t-1)], (T,); before the first step nothing is lost."""
        return np.diff(self.expected_mse(power), prepend=0.0)

    @property
    def usual_threshold(self) -> float:
        """M where none is given."""
        return FLOW_THRESHOLD if self.flow else THRESHOLD

    @property
    def usual_snr_weight(self) -> float:
        """lambda where none is given."""
        return FLOW_SNR_WEIGHT if self.flow else SNR_WEIGHT

    def expected_gain(self, power: float | None = None) -> np.ndarray:
        """What the score is made of: E[Grad(t)], of flow matching by unit of -ln SNR, (T,).

        The train timesteps of a flow are a numbering of sigma, evenly or shifted, and say nothing
        of how fast the picture comes: by timestep, E[Grad] = (1 + P) d sigma^2 has its largest
        value at sigma 1 without a shift and at 0.5 with a shift of 3, of the same model. By
        -ln SNR, which is what a stage is kept by, it is (1 + P) sigma^2 (1 - sigma) whatever
        the shift, and has its largest value at sigma 2/3.
        """
        gradient = self.expected_gradient(power)
        if not self.flow:
            return gradient
        with np.errstate(divide="ignore"):
            ratio = 2 * (np.log(self.noise) - np.log(self.signal))
            return gradient / np.diff(ratio, prepend=-np.inf)  # infinite at both ends: no gain

    def score(self, power: float | None = None, snr_weight: float | None = None) -> np.ndarray:
        """score(t) = E[Grad(t)] / max E[Grad] + lambda ln SNR(t), (T,); see `expected_gain`.

        Args:
            power: P, the mean square of the clean latents; the usual one by default.
            snr_weight: lambda; the usual one by default.
        """
        if snr_weight is None:
            snr_weight = self.usual_snr_weight
        gain = self.expected_gain(power)
        return gain / gain.max() + snr_weight * self.log_snr


def log_snr(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return ln(signal^2 / noise^2) clamped to +-LOG_SNR_LIMIT."""
    with np.errstate(divide="ignore"):
        ratio = 2 * (np.log(signal) - np.log(noise))
    return np.clip(ratio, -LOG_SNR_LIMIT, LOG_SNR_LIMIT)


def step_log_snr(scheduler: Any) -> np.ndarray:
    """Return ln SNR of every entry of `scheduler.timesteps`, after `set_timesteps`, clamped.

    It is that of what the denoiser is given there. Reads tensors that the schedulers keep on the
    CPU; see `schedulers.step_levels`.
    """
    return log_snr(*step_levels(scheduler))
