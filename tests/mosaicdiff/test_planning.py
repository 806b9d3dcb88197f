"""Stages of equal steps, bins for stages from the data, and what shares can reach."""

import numpy as np
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.allocation.planning import equal_division, make_frame, most_sparsity, share_plan
from mosaicdiff.trajectory.schedule import NoiseSchedule

from .conftest import linear_scheduler, tiny_batches, tiny_denoiser

SCHEDULE = NoiseSchedule.from_scheduler(linear_scheduler())


@given(st.lists(st.integers(0, 999), min_size=1, max_size=60, unique=True), st.data())
def test_equal_stages_differ_by_one_step_at_most(timesteps, data):
    visited = np.array(sorted(timesteps, reverse=True), dtype=float)
    count = data.draw(st.integers(1, len(visited)))
    division = equal_division(SCHEDULE, visited, count)
    steps = division.count_steps(SCHEDULE.log_snr[visited.astype(int)])
    assert len(steps) == count and sum(steps) == len(visited)
    assert max(steps) - min(steps) <= 1


def test_more_stages_than_steps_are_refused():
    with pytest.raises(ValueError, match="stages must be at most 3, the sampling steps, got 4"):
        equal_division(SCHEDULE, np.array([900.0, 500.0, 100.0]), 4)


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]
)
@pytest.mark.parametrize("stages", [1, 2, 5, 20])
def test_equal_stages_of_real_samplers(scheduler, stages):
    frame = make_frame(linear_scheduler(scheduler), PruneConfig(stages=stages, steps=20))
    assert frame.steps == (20 // stages,) * stages


@pytest.mark.parametrize("allocation", ["score", "optimal"])
def test_five_stages_through_the_whole_job(allocation):
    staged, report = (
        (
            result := mosaicdiff.prune(
                tiny_denoiser(),
                PruneConfig(sparsity=0.3, stages=5, allocation=allocation, samples=32, steps=20),
                scheduler=linear_scheduler(),
                calibration=tiny_batches(),
            )
        ).denoiser,
        result.report,
    )
    assert [stage.steps for stage in report.stages] == [4] * 5
    assert len(staged.stage_models) == 5
    assert report.sparsity == pytest.approx(0.3, abs=0.005)


@pytest.mark.parametrize("power", [0.3, 1.0])
@pytest.mark.parametrize("bins", [4, 10, 20])
@pytest.mark.parametrize("steps", [10, 20, 30, 50, 100])
def test_bins_hold_the_boundaries_of_the_closed_form(steps, bins, power):
    scheduler = linear_scheduler()
    auto = make_frame(scheduler, PruneConfig(stages="auto", steps=steps, bins=bins), power)
    formed = make_frame(scheduler, PruneConfig(steps=steps), power)
    edges = {stage.first for stage in auto.division.stages}
    assert {stage.first for stage in formed.division.stages} <= edges
    assert all(count > 0 for count in auto.steps) and sum(auto.steps) == steps
    assert min(bins, steps) <= len(edges) <= bins + 2


@pytest.mark.parametrize("allocation", ["score", "uniform"])
@pytest.mark.parametrize("keep", [(), ("transformer_blocks.1.*",), ("*.attn1",)])
def test_the_most_that_shares_can_reach_is_reached(allocation, keep):
    denoiser = tiny_denoiser()
    layers = adapter_for(denoiser).layers(denoiser)
    config = PruneConfig(allocation=allocation, exclude=keep, max_sparsity=0.8)
    frame = make_frame(linear_scheduler(), config)
    most = most_sparsity(layers, frame, config)
    plan = share_plan(layers, frame, config, most)
    assert plan.sparsity == pytest.approx(most, rel=0.02)
    with pytest.raises(ValueError, match=f"sparsity must be at most {most:.4f}"):
        share_plan(layers, frame, config, most + 0.001)
