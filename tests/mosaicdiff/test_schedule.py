import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from mosaicdiff.trajectory.schedule import (
    LOG_SNR_LIMIT,
    NAMED_SCHEDULES,
    NoiseSchedule,
    step_log_snr,
)


@pytest.mark.parametrize("name", NAMED_SCHEDULES)
@pytest.mark.parametrize("power", [0.3, 1.0, 2.5])
def test_gradient_is_the_closed_form_of_the_paper(name, power):
    schedule = NoiseSchedule.named(name)
    abar = schedule.signal**2
    before = np.concatenate([[1.0], abar[:-1]])
    delta = abar - before
    closed = (delta + 2 * (np.sqrt(before) - np.sqrt(abar))) * power - delta
    np.testing.assert_allclose(schedule.expected_gradient(power), closed, atol=1e-12)


@pytest.mark.parametrize(
    "kind, name",
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("squaredcos_cap_v2",) * 2],
)
def test_named_schedules_are_those_of_diffusers(kind, name):
    ranges = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
    start, end = ranges.get(name, (1e-4, 0.02))
    scheduler = DDIMScheduler(beta_schedule=name, beta_start=start, beta_end=end)
    ours = NoiseSchedule.named(kind)
    theirs = NoiseSchedule.from_scheduler(scheduler)
    np.testing.assert_allclose(ours.signal, theirs.signal, rtol=2e-4)


def test_expected_mse_is_what_noising_measures():
    schedule = NoiseSchedule.named("linear")
    clean = 0.7 * torch.randn(2000, 16, dtype=torch.float64)
    power = float(clean.square().mean())
    for t in (10, 400, 900):
        noisy = schedule.signal[t] * clean + schedule.noise[t] * torch.randn_like(clean)
        measured = float((noisy - clean).square().mean())
        assert measured == pytest.approx(schedule.expected_mse(power)[t], rel=0.03)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "cls",
    [
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
    ],
)
def test_step_snr_agrees_with_the_train_schedule(cls, spacing):
    scheduler = cls(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, timestep_spacing=spacing
    )
    scheduler.set_timesteps(12)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    steps = scheduler.timesteps.double().numpy()
    expected = np.interp(steps, np.arange(len(schedule)), schedule.log_snr)
    difference = np.abs(step_log_snr(scheduler) - expected)[steps > 5] / np.log(10)
    assert difference.max() < 0.02


def test_zero_terminal_snr_is_clamped():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert schedule.log_snr[-1] == -LOG_SNR_LIMIT
    assert np.isfinite(schedule.score()).all()


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        EDMEulerScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
)
def test_a_scheduler_without_snr_is_refused(scheduler):
    with pytest.raises(ValueError, match="scheduler must be variance preserving"):
        NoiseSchedule.from_scheduler(scheduler)


@pytest.mark.parametrize(
    "alphas, message",
    [
        ([0.5], "at least 2 numbers"),
        ([0.5, 0.6], "must fall"),
        ([1.5, 0.6], r"must lie in \[0, 1\]"),
        ([float("nan"), 0.6], r"must lie in \[0, 1\]"),
    ],
)
def test_bad_alphas_are_refused(alphas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_alphas_cumprod(alphas)


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name must be one of linear"):
        NoiseSchedule.named("cosine")


@given(st.floats(0.01, 10), st.floats(0, 0.2))
def test_largest_score_without_snr_is_one(power, weight):
    schedule = NoiseSchedule.named("linear")
    assert schedule.score(power, 0.0).max() == pytest.approx(1.0)
    shift = schedule.score(power, weight) - schedule.score(power, 0.0)
    np.testing.assert_allclose(shift, weight * schedule.log_snr, atol=1e-9)
