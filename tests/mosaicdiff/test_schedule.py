import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from mosaicdiff import PruneConfig
from mosaicdiff.allocation.planning import make_frame
from mosaicdiff.statistics.noising import add_noise
from mosaicdiff.trajectory.schedule import (
    LOG_SNR_LIMIT,
    NAMED_SCHEDULES,
    NoiseSchedule,
    step_log_snr,
)
from mosaicdiff.trajectory.schedulers import Sampling
from mosaicdiff.trajectory.stages import divide


@pytest.mark.parametrize("name", [name for name in NAMED_SCHEDULES if name != "flow"])
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
    "scheduler, message",
    [
        (IPNDMScheduler(), "got IPNDMScheduler, which gives no signal-to-noise"),
        (CMStochasticIterativeScheduler(), "got CMStochasticIterativeScheduler, which gives no"),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
            "one of diffusers' FlowMatch classes, or have use_flow_sigmas",
        ),
    ],
)
def test_a_scheduler_without_snr_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_scheduler(scheduler)


FLOWS = [
    lambda: FlowMatchEulerDiscreteScheduler(),
    lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    lambda: UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
    lambda: DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
]


@pytest.mark.parametrize("make", FLOWS[:3])
def test_a_flow_schedule_is_that_of_the_scheduler(make):
    scheduler = make()
    schedule = NoiseSchedule.from_scheduler(scheduler)
    sigmas, names = scheduler.sigmas.flip(0), scheduler.timesteps.flip(0)
    np.testing.assert_allclose(schedule.noise, sigmas, rtol=1e-6)
    np.testing.assert_allclose(schedule.signal, 1 - sigmas.double(), atol=1e-6)
    np.testing.assert_allclose(schedule.timesteps, names, rtol=1e-6)
    assert schedule.log_snr[-1] == -LOG_SNR_LIMIT
    scheduler.set_timesteps(7)  # a run changes what the scheduler holds, not its schedule
    again = NoiseSchedule.from_scheduler(scheduler)
    np.testing.assert_array_equal(again.noise, schedule.noise)


@pytest.mark.parametrize("make", FLOWS)
def test_step_snr_of_flow_is_that_of_what_the_denoiser_is_given(make):
    scheduler = make()
    scheduler.set_timesteps(9)
    given = scheduler.timesteps.double().numpy() / 1000
    expected = np.clip(2 * (np.log1p(-given.clip(max=1 - 1e-9)) - np.log(given)), -14, 14)
    found = step_log_snr(scheduler)
    assert (np.diff(found) >= 0).all()
    # Whole timesteps are rounded down by some schedulers.
    middle = (given > 0.02) & (given < 0.98)
    np.testing.assert_allclose(found[middle], expected[middle], atol=0.06)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    by_index = np.interp(schedule.index_of(scheduler.timesteps), range(1000), schedule.log_snr)
    np.testing.assert_allclose(by_index[middle], expected[middle], atol=0.06)


def test_noised_latents_are_those_of_the_flow_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    clean, noise = torch.randn(2, 3, 2, 4, 4)
    index = torch.tensor([0, 417, 999])
    theirs = scheduler.scale_noise(clean, scheduler.timesteps.flip(0)[index], noise)
    ours = add_noise(schedule, clean, noise, index)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_flow_is_scored_by_unit_of_log_snr(shift):
    """By timestep E[Grad] is (1 + P) d sigma^2, whose peak a shift moves; by ln SNR it stays."""
    schedule = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift))
    sigma = schedule.noise
    expected = 1.7 * np.diff(sigma**2, prepend=0.0)
    np.testing.assert_allclose(schedule.expected_gradient(0.7), expected, atol=1e-12)
    closed = 1.7 * sigma**2 * (1 - sigma)
    gain = schedule.expected_gain(0.7)
    np.testing.assert_allclose(gain[20:-20], closed[20:-20], rtol=0.05, atol=2e-3)
    assert sigma[gain.argmax()] == pytest.approx(2 / 3, abs=0.01)
    assert gain[-1] == 0.0 and np.isfinite(schedule.score()).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift": 3.0},
        {"shift": 12.0},
        {"use_dynamic_shifting": True},
        {"shift": 3.0, "invert_sigmas": True},
    ],
)
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_flow_has_three_stages_at_one_place_whatever_the_shift(options, power):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    division = divide(NoiseSchedule.from_scheduler(scheduler), power=power)
    assert [stage.name for stage in division.stages] == ["early", "middle", "late"]
    cuts = 1 / (1 + np.exp(np.asarray(division.boundaries) / 2))
    # E[MSE] = (1 + P) sigma^2: the power is a factor, and changes nothing.
    np.testing.assert_allclose(cuts, [0.861, 0.303], atol=0.006)
    tokens = Sampling(tokens=4096)
    frame = make_frame(scheduler, PruneConfig(steps=28), power, tokens)
    assert len(frame.steps) == 3 and min(frame.steps) >= 1 and sum(frame.steps) == 28


def test_a_dynamic_shift_moves_the_steps_as_a_static_one_of_the_same_size():
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    static = FlowMatchEulerDiscreteScheduler(shift=float(np.exp(1.15)))
    config = PruneConfig(steps=28)
    sampling = Sampling(tokens=4096, passes_sigmas=True)
    frames = [make_frame(s, config, None, sampling) for s in (dynamic, static)]
    np.testing.assert_allclose(frames[0].visited, frames[1].visited, atol=1e-4)
    assert frames[0].steps == frames[1].steps


@pytest.mark.parametrize(
    "sigmas, message",
    [([0.5], "at least 2 numbers"), ([0.5, 0.4], "must rise"), ([0.0, 0.4], "must rise")],
)
def test_bad_sigmas_are_refused(sigmas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_sigmas(sigmas)


def test_a_shift_that_depends_on_the_resolution_needs_the_tokens():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="use_dynamic_shifting=False and the shift of your size"):
        make_frame(scheduler, PruneConfig())


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
