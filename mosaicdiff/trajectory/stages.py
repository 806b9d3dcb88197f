"""Divide the trajectory into stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .schedule import NoiseSchedule, log_snr
from .schedulers import NAMINGS, named_levels

NAMES = ("early", "middle", "late")


@dataclass(frozen=True)
class Stage:
    """A run of train timesteps `first..last` (counted from 0 as in `schedule`, both included)."""

    name: str
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class Division:
    """The stages of a trajectory, noisiest first, and the ln SNR that parts them.

    Boundaries are kept as ln SNR because samplers differ in what they hand the denoiser as a
    timestep; `boundaries[k]` lies between stage k (noisier) and stage k + 1.

    Args:
        stages: noisiest first.
        boundaries: ln SNR.
        naming: how the schedulers of this family call a train timestep, one of
            `schedulers.NAMINGS`: of a denoiser that no scheduler is attached to, all that is seen
            is the timestep.
        total: T, the timesteps of the schedule.

    Raises:
        ValueError: no such naming.
    """

    stages: tuple[Stage, ...]
    boundaries: tuple[float, ...]
    naming: str = field(default="number", compare=False)
    total: int = field(default=1000, compare=False)

    def __post_init__(self) -> None:
        if self.naming not in NAMINGS:
            raise ValueError(
                f"Division: naming must be one of {', '.join(NAMINGS)}, got {self.naming!r}."
            )

    def __len__(self) -> int:
        return len(self.stages)

    @classmethod
    def at_timesteps(cls, schedule: NoiseSchedule, starts: Sequence[int]) -> Division:
        """Divide at explicit timesteps: `t >= start` is the noisier side.

        Raises:
            ValueError: a start is outside 1..T-1.
        """
        total = len(schedule)
        cuts = sorted(set(starts), reverse=True)
        if any(not 1 <= cut < total for cut in cuts):
            raise ValueError(
                f"Division: boundaries must be timesteps in 1..{total - 1}, got {list(starts)}."
            )
        edges = [total, *cuts, 0]
        runs = [(low, high - 1) for high, low in zip(edges, edges[1:], strict=False)]
        names = NAMES if len(runs) == 3 else [f"stage-{k}" for k in range(len(runs))]
        if len(runs) == 1:
            names = ["all"]
        ratio = schedule.log_snr
        return cls(
            tuple(Stage(n, low, high) for n, (low, high) in zip(names, runs, strict=True)),
            tuple(float(ratio[cut] + ratio[cut - 1]) / 2 for cut in cuts),
            schedule.naming,
            total,
        )

    def stage_of_log_snr(self, log_snr: Any) -> np.ndarray:
        """Return the stage index for each ln SNR."""
        return np.searchsorted(np.asarray(self.boundaries), log_snr, side="right")

    def stage_of_timestep(self, timestep: float) -> int:
        """Return the stage index of what a scheduler calls a train timestep.

        A fraction of a number goes to the nearest.
        """
        if self.naming != "number":
            signal, noise = named_levels(self.naming, timestep, self.total)
            return int(self.stage_of_log_snr(log_snr(np.asarray(signal), np.asarray(noise))))
        nearest = round(timestep)
        for index, stage in enumerate(self.stages):
            if nearest >= stage.first:
                return index
        return len(self.stages) - 1

    def count_steps(self, step_log_snr: Any) -> list[int]:
        """Count the sampling steps that fall in each stage."""
        found = self.stage_of_log_snr(step_log_snr)
        return np.bincount(found, minlength=len(self.stages)).tolist()

    def clipped(self, first: int, last: int) -> Division:
        """Let the stages end within `first..last`, of which every stage must hold some."""
        stages = tuple(
            Stage(stage.name, max(stage.first, first), min(stage.last, last))
            for stage in self.stages
        )
        return Division(stages, self.boundaries, self.naming, self.total)

    def without_empty(self, schedule: NoiseSchedule, step_log_snr: Any) -> Division:
        """Merge every stage that no sampling step visits into its cleaner neighbour.

        A cleanest stage without steps goes to the last that has some.
        """
        counts = self.count_steps(step_log_snr)
        if all(counts):
            return self
        visited = [stage for stage, count in zip(self.stages, counts, strict=True) if count]
        starts = [stage.first for stage in visited[:-1]]
        merged = Division.at_timesteps(schedule, starts)
        named = tuple(
            Stage(old.name, new.first, new.last)
            for old, new in zip(visited, merged.stages, strict=True)
        )
        return Division(named, merged.boundaries, schedule.naming, len(schedule))


def divide(
    schedule: NoiseSchedule,
    *,
    power: float | None = None,
    threshold: float | None = None,
    snr_weight: float | None = None,
) -> Division:
    """Divide by the closed-form score: the middle stage is where pretraining learns fast.

    The middle stage is the contiguous run of timesteps around the largest score with
    score >= threshold * largest. What is noisier is the early stage, what is cleaner the late
    one; either may be missing.

    Args:
        power: P, the mean square of the clean latents; the schedule's usual one by default.
        threshold: M in (0, 1); the schedule's usual one by default.
        snr_weight: lambda, not negative; the schedule's usual one by default.

    Source: MosaicDiff (arXiv 2510.11962), section 3; threshold and lambda are our defaults.
    """
    if threshold is None:
        threshold = schedule.usual_threshold
    score = schedule.score(power, snr_weight)
    peak = int(score.argmax())
    fast = score >= threshold * score[peak]
    first = peak
    while first > 0 and fast[first - 1]:
        first -= 1
    last = peak
    while last < len(score) - 1 and fast[last + 1]:
        last += 1
    starts, names = [], []
    if last < len(score) - 1:
        starts.append(last + 1)
        names.append("early")
    names.append("middle")
    if first > 0:
        starts.append(first)
        names.append("late")
    division = Division.at_timesteps(schedule, starts)
    named = tuple(
        Stage(name, stage.first, stage.last)
        for name, stage in zip(names, division.stages, strict=True)
    )
    return Division(named, division.boundaries, schedule.naming, len(schedule))


def stage_means(division: Division, values: np.ndarray, step_log_snr: Any) -> list[float]:
    """Average a per-step value over the sampling steps of each stage.

    Args:
        values: one number for each sampling step.
        step_log_snr: ln SNR of each sampling step.
    """
    found = division.stage_of_log_snr(step_log_snr)
    return [float(np.asarray(values)[found == k].mean()) for k in range(len(division))]
