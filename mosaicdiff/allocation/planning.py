"""From a configuration to whole numbers: stages, shares, groups to remove. No model is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..config import PruneConfig
from ..groups import PrunableLayer
from ..patterns import check_patterns, matches
from ..trajectory.schedule import NoiseSchedule, step_log_snr
from ..trajectory.schedulers import Sampling, start_steps
from ..trajectory.span import Span
from ..trajectory.stages import Division, divide, stage_means
from .budget import TOLERANCE
from .costs import CostModel, describe_cost
from .items import allowed_levels
from .shares import layer_counts, score_give, stage_shares


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


@dataclass(frozen=True)
class Frame:
    """The stages of a request and the sampling steps in them; what a plan is made within.

    Args:
        schedule: train schedule of the scheduler.
        division: the stages, noisiest first; bins for `stages="auto"`.
        steps: sampling steps of each stage.
        visited: ln SNR of every sampling step that the denoiser is called at.
        power: P, the mean square of the clean latents.
        span: the timesteps that it is called at.
    """

    schedule: NoiseSchedule
    division: Division
    steps: tuple[int, ...]
    visited: np.ndarray
    power: float
    span: Span = Span()

    def settle(self, division: Division) -> Frame:
        """Return the same with other stages: those without steps merged, clipped to the span."""
        division = division.without_empty(self.schedule, self.visited)
        steps = tuple(division.count_steps(self.visited))
        if not self.span.whole:
            seen = np.flatnonzero(self.span.holds(self.schedule.timesteps))
            division = division.clipped(int(seen[0]), int(seen[-1]))
        return replace(self, division=division, steps=steps)


def make_frame(
    scheduler: Any,
    config: PruneConfig,
    power: float | None = None,
    sampling: Sampling | None = None,
    span: Span | None = None,
) -> Frame:
    """Divide the trajectory and count the sampling steps of the stages.

    Args:
        scheduler: a diffusers scheduler; it is not touched.
        config: the request.
        power: P, the mean square of the clean latents; the schedule's usual one by default.
        sampling: how the pipeline starts its sampler.
        span: the timesteps that the denoiser is called at, where the pipeline has two. Other
            steps count nothing, and its stages end where it is called no more.

    Raises:
        ValueError: the scheduler gives no signal-to-noise ratio, or the steps do not fit, or none
            of them is in the span.
    """
    schedule = NoiseSchedule.from_scheduler(scheduler)
    sampler = type(scheduler).from_config(scheduler.config)
    if config.steps > len(schedule):
        raise ValueError(
            f"prune: steps must be at most {len(schedule)}, the timesteps of the schedule, "
            f"got {config.steps}."
        )
    start_steps(sampler, config.steps, sampling)
    visited = step_log_snr(sampler)
    span = span or Span()
    mine = span.holds(sampler.timesteps.cpu())
    if not (mine.any() and span.holds(schedule.timesteps).any()):
        raise ValueError(
            f"prune: steps must reach the timesteps that the denoiser is called at, {span}, got "
            f"{config.steps} from {float(sampler.timesteps[0]):g} on. Take more steps, or prune "
            "the other denoiser alone (component)."
        )
    visited = visited[mine]
    power = schedule.usual_power if power is None else power
    division = make_division(schedule, config, power, schedule.index_of_log_snr(visited))
    return Frame(schedule, division, (), visited, power, span).settle(division)


def make_division(
    schedule: NoiseSchedule, config: PruneConfig, power: float, timesteps: np.ndarray
) -> Division:
    """Divide a schedule as a configuration asks; `auto` gives its bins."""
    if config.boundaries is not None:
        return Division.at_timesteps(schedule, config.boundaries)
    count = config.stage_count
    if count == 3:
        return divide(
            schedule, power=power, threshold=config.threshold, snr_weight=config.snr_weight
        )
    if count == "auto":
        # The closed form's boundaries are among the bins', so that the data may prefer them.
        even = equal_division(schedule, timesteps, min(config.bins, len(timesteps)))
        formed = divide(
            schedule, power=power, threshold=config.threshold, snr_weight=config.snr_weight
        )
        starts = {s.first for s in formed.stages if s.first > 0}
        # Two boundaries between the same two sampling steps part the same; one would be dropped.
        parted = {int((timesteps >= start).sum()) for start in starts}
        for stage in even.stages:
            if stage.first > 0 and int((timesteps >= stage.first).sum()) not in parted:
                starts.add(stage.first)
        return Division.at_timesteps(schedule, sorted(starts))
    return equal_division(schedule, timesteps, int(count))


def equal_division(schedule: NoiseSchedule, timesteps: np.ndarray, count: int) -> Division:
    """Divide so that every stage has as many sampling steps as the others, give or take one.

    Raises:
        ValueError: there are fewer steps than stages.
    """
    if count > len(timesteps):
        raise ValueError(
            f"prune: stages must be at most {len(timesteps)}, the sampling steps, got {count}."
        )
    firsts = [round(k * len(timesteps) / count) for k in range(1, count)]
    starts = [int(np.ceil((timesteps[i - 1] + timesteps[i]) / 2)) for i in firsts]
    return Division.at_timesteps(schedule, starts)


def share_plan(
    layers: Sequence[PrunableLayer], frame: Frame, config: PruneConfig, sparsity: float
) -> PrunePlan:
    """Allocate by shares: `score`, `uniform` (at a sparsity) or `explicit` (which states its own).

    Raises:
        ValueError: the sparsity cannot be met under the cap, or explicit shares do not fit the
            stages or layers.
    """
    shares = shares_of_stages(frame, config, sparsity, _most_of_stage(layers, config))
    ladders = [allowed_levels(layer, config) for layer in layers]
    names = [layer.name for layer in layers]
    removed = tuple(
        tuple(
            layer_counts(
                layers, layer_shares(names, share, k, len(frame.division), config), ladders
            )
        )
        for k, share in enumerate(shares)
    )
    return PrunePlan(frame.division, frame.steps, tuple(shares), tuple(layers), removed)


def most_sparsity(layers: Sequence[PrunableLayer], frame: Frame, config: PruneConfig) -> float:
    """Return the largest sparsity that `score` or `uniform` can reach."""
    give = np.asarray(_stage_give(frame, config)) > 0
    weight = np.asarray(frame.steps, dtype=float) / sum(frame.steps)
    return float((weight * give).sum()) * _most_of_stage(layers, config)


def _most_of_stage(layers: Sequence[PrunableLayer], config: PruneConfig) -> float:
    """Return the largest share that one stage can give: the cap, or all that may go."""
    total = sum(layer.groups * layer.cost for layer in layers)
    may_go = sum(allowed_levels(layer, config)[-1] * layer.cost for layer in layers) / total
    return min(config.max_sparsity, may_go)


def effort_bounds(
    layers: Sequence[PrunableLayer], frame: Frame, config: PruneConfig, costs: CostModel
) -> None:
    """Refuse a budget that even the largest effort does not meet, before anything is calibrated.

    Raises:
        ValueError: the message says what can be had.
    """
    budget = config.budget
    if budget.unit == "quality" or (budget.unit == "latency" and costs.call_ms is None):
        return  # only a measurement tells
    by_share = config.allocation in ("score", "uniform")
    if by_share and budget.unit == "sparsity":
        reach = most_sparsity(layers, frame, config)
        if budget.value > reach + 1e-12:
            raise _too_sparse(reach, budget.value)
        return
    if by_share:
        removed = share_plan(layers, frame, config, most_sparsity(layers, frame, config)).removed
    else:
        row = tuple(allowed_levels(layer, config)[-1] for layer in layers)
        removed = tuple(row for _ in frame.steps)
    least, dense = costs.cost(budget.unit, removed), costs.dense(budget.unit)
    if budget.unit == "sparsity":
        most = min(least, config.max_sparsity)
        if budget.value > most * (1 + TOLERANCE):
            raise _too_sparse(most, budget.value)
        return
    wanted = budget.target(dense)
    if not least * (1 - TOLERANCE) <= wanted <= max(dense, least) * (1 + TOLERANCE):
        low, high = (describe_cost(budget.unit, value) for value in (least, dense))
        raise ValueError(
            f"prune: {budget.unit} must be between {low} (all that may go) and {high} (dense) "
            f"with these settings, got {describe_cost(budget.unit, wanted)}. Ask for something "
            "between them, or leave less whole."
        )


def _too_sparse(most: float, asked: float) -> ValueError:
    return ValueError(
        f"prune: sparsity must be at most {most:.4f} with these settings, got {asked:g}. "
        "Ask for less, or raise max_sparsity and leave less whole."
    )


def step_scores(
    schedule: NoiseSchedule, visited: np.ndarray, power: float, snr_weight: float | None
) -> np.ndarray:
    """Return score / max score at every sampling step, read off by ln SNR."""
    score = schedule.score(power, snr_weight)
    order = np.argsort(schedule.log_snr, kind="stable")
    return np.interp(visited, schedule.log_snr[order], score[order]) / score.max()


def shares_of_stages(frame: Frame, config: PruneConfig, sparsity: float, cap: float) -> list[float]:
    """Return the share that each stage gives up: stated, by its score, or all alike.

    Args:
        cap: the most that one stage may give.

    Raises:
        ValueError: the sparsity cannot be met under the cap, or there is not one share a stage.
    """
    division = frame.division
    if config.allocation == "explicit":
        given = config.stage_sparsity or ()
        if len(given) != len(division):
            raise ValueError(
                f"prune: stage_sparsity must have one share for each of {len(division)} stages "
                f"({', '.join(stage.name for stage in division.stages)}), got {len(given)}."
            )
        return list(given)
    return stage_shares(_stage_give(frame, config), frame.steps, sparsity, cap)


def _stage_give(frame: Frame, config: PruneConfig) -> list[float]:
    """Return what each stage gives up, up to a common factor: by its score, or all alike."""
    if config.allocation == "uniform" or len(frame.division) == 1:
        return [1.0] * len(frame.division)
    scores = step_scores(frame.schedule, frame.visited, frame.power, config.snr_weight)
    return score_give(stage_means(frame.division, scores, frame.visited))


def layer_shares(
    names: Sequence[str], share: float, stage: int, stages: int, config: PruneConfig
) -> list[float]:
    """Return the share of every layer or linear of a stage: its own, or else the stage's.

    Raises:
        ValueError: `layer_sparsity` names nothing, or has not one share for each stage.
    """
    stated = config.layer_sparsity or {}
    check_patterns(names, stated, "layer_sparsity")
    for pattern, row in stated.items():
        if not isinstance(row, (int, float)) and len(row) != stages:
            raise ValueError(
                f"prune: layer_sparsity[{pattern!r}] must have one share for each of "
                f"{stages} stages, or one for all, got {len(row)}."
            )
    shares = []
    for name in names:
        rows = [row for pattern, row in stated.items() if matches(name, pattern)]
        last = rows[-1] if rows else share
        shares.append(float(last if isinstance(last, (int, float)) else last[stage]))
    return shares
