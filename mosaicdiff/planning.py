"""From a configuration to whole numbers: stages, shares, groups to remove. No model is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .allocate import layer_counts, score_give, stage_shares
from .config import PruneConfig
from .groups import PrunableLayer
from .schedule import NoiseSchedule, step_log_snr
from .stages import Division, divide, stage_means


@dataclass(frozen=True)
class PrunePlan:
    """Say what each stage gives up, before anything is calibrated.

    Args:
        division: the stages, noisiest first.
        steps: sampling steps of each stage.
        shares: wanted share of the prunable MACs of each stage.
        layers: what may be removed.
        removed: groups to remove, by stage and layer.
    """

    division: Division
    steps: tuple[int, ...]
    shares: tuple[float, ...]
    layers: tuple[PrunableLayer, ...]
    removed: tuple[tuple[int, ...], ...]

    def stage_sparsity(self, stage: int) -> float:
        """Return the share of the prunable MACs that a stage gives up after rounding."""
        total = sum(layer.groups * layer.cost for layer in self.layers)
        gone = sum(
            n * layer.cost for n, layer in zip(self.removed[stage], self.layers, strict=True)
        )
        return gone / total

    @property
    def sparsity(self) -> float:
        """The mean over the sampling steps, after rounding."""
        return sum(
            count * self.stage_sparsity(stage) for stage, count in enumerate(self.steps)
        ) / sum(self.steps)


def make_plan(
    layers: Sequence[PrunableLayer], scheduler: Any, config: PruneConfig, power: float = 1.0
) -> PrunePlan:
    """Divide and allocate.

    Args:
        layers: of the denoiser.
        scheduler: a diffusers scheduler; it is not touched.
        config: the request.
        power: P, the mean square of the clean latents.

    Raises:
        ValueError: the scheduler gives no signal-to-noise ratio, the sparsity cannot be met
            under the cap, or explicit shares do not fit the stages or layers.
    """
    schedule = NoiseSchedule.from_scheduler(scheduler)
    sampler = type(scheduler).from_config(scheduler.config)
    if config.steps > len(schedule):
        raise ValueError(
            f"prune: steps must be at most {len(schedule)}, the timesteps of the schedule, "
            f"got {config.steps}."
        )
    sampler.set_timesteps(config.steps)
    visited = step_log_snr(sampler)
    division = make_division(schedule, config, power).without_empty(schedule, visited)
    steps = division.count_steps(visited)
    shares = _stage_shares(schedule, division, visited, steps, config, power)
    removed = tuple(
        tuple(
            layer_counts(
                layers, _layer_shares(layers, share, k, len(division), config), config.round_to
            )
        )
        for k, share in enumerate(shares)
    )
    return PrunePlan(division, tuple(steps), tuple(shares), tuple(layers), removed)


def make_division(schedule: NoiseSchedule, config: PruneConfig, power: float) -> Division:
    """Divide a schedule as a configuration asks."""
    if config.boundaries is not None:
        return Division.at_timesteps(schedule, config.boundaries)
    if config.stages == 1:
        return Division.at_timesteps(schedule, ())
    return divide(schedule, power=power, threshold=config.threshold, snr_weight=config.snr_weight)


def step_scores(
    schedule: NoiseSchedule, visited: np.ndarray, power: float, snr_weight: float
) -> np.ndarray:
    """Return score / max score at every sampling step, read off by ln SNR."""
    score = schedule.score(power, snr_weight)
    order = np.argsort(schedule.log_snr, kind="stable")
    return np.interp(visited, schedule.log_snr[order], score[order]) / score.max()


def _stage_shares(
    schedule: NoiseSchedule,
    division: Division,
    visited: np.ndarray,
    steps: Sequence[int],
    config: PruneConfig,
    power: float,
) -> list[float]:
    if config.allocation == "explicit":
        given = config.stage_sparsity or ()
        if len(given) != len(division):
            raise ValueError(
                f"prune: stage_sparsity must have one share for each of {len(division)} stages "
                f"({', '.join(stage.name for stage in division.stages)}), got {len(given)}."
            )
        return list(given)
    give = [1.0] * len(division)
    if config.allocation == "score" and len(division) > 1:
        scores = step_scores(schedule, visited, power, config.snr_weight)
        give = score_give(stage_means(division, scores, visited))
    return stage_shares(give, steps, config.sparsity, config.max_sparsity)


def _layer_shares(
    layers: Sequence[PrunableLayer], share: float, stage: int, stages: int, config: PruneConfig
) -> list[float]:
    named = dict(config.layer_sparsity or {})
    shares = []
    for layer in layers:
        row = named.pop(layer.name, None)
        if row is not None and len(row) != stages:
            raise ValueError(
                f"prune: layer_sparsity[{layer.name!r}] must have one share for each of "
                f"{stages} stages, got {len(row)}."
            )
        shares.append(share if row is None else row[stage])
    if named:
        raise ValueError(
            f"prune: layer_sparsity must name layers of the denoiser, got {sorted(named)}. "
            f"The first is {layers[0].name!r}."
        )
    return shares
