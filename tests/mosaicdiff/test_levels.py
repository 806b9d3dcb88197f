"""SNR(t) of every scheduler and option, to 0.01 in log10: measured, and written out."""

import diffusers
import numpy as np
import pytest

from mosaicdiff.trajectory.schedule import LOG_SNR_LIMIT, NoiseSchedule, step_log_snr
from mosaicdiff.trajectory.schedulers import Sampling, start_steps

from .oracle import Oracle

TOLERANCE = 0.01
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPACINGS = ("leading", "trailing", "linspace")
RAMPS = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
)

#: With sigmas of another spacing than the timesteps'.
RAMPED = ["DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "HeunDiscrete", "LMSDiscrete",
          "KDPM2Discrete", "DEISMultistep"]  # fmt: skip
PLAIN = ["DDIM", "DDPM", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "LCM", "TCD",
         "SASolver"]  # fmt: skip
#: Which would clip the prediction to [-1, 1].
CLIPS = ("DDIM", "DDPM")
FLOWS = ["DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"]


def make(name, **options):
    return getattr(diffusers, f"{name}Scheduler")(**options)


def cases():
    for name in RAMPED:
        for spacing in SPACINGS:
            for ramp in RAMPS:
                yield name, {**LINEAR, "timestep_spacing": spacing, **ramp}
        yield name, {**SCALED, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    for name in PLAIN:
        clips = {"clip_sample": False} if name in CLIPS else {}
        # DDIM and PNDM step by T // N whatever their timesteps: with `linspace` the denoiser is
        # told another time than its input has. That case is written out below.
        for spacing in SPACINGS[: 2 if name == "DDIM" else 3]:
            yield name, {**LINEAR, "timestep_spacing": spacing, **clips}
        yield name, {**SCALED, "prediction_type": "v_prediction", **clips}
    for spacing in SPACINGS[:2]:
        yield "PNDM", {**LINEAR, "skip_prk_steps": True, "timestep_spacing": spacing}
    for ramp in RAMPS:
        yield "DPMSolverSinglestep", {**LINEAR, **ramp}
    yield "PNDM", {**LINEAR, "skip_prk_steps": True, "steps_offset": 1}
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    for name in ("DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete"):
        clips = {"clip_sample": False} if name in CLIPS else {}
        yield name, {**LINEAR, **zero, "timestep_spacing": "trailing", **clips}
    for name in FLOWS:
        for shift in (1.0, 3.0):
            flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            yield name, {**flow, "flow_shift": shift}
    for name in ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"):
        for shift in (1.0, 3.0):
            yield name, {"shift": shift}
    for ramp in RAMPS[1:]:
        yield "FlowMatchEulerDiscrete", {"shift": 3.0, **ramp}
    yield "FlowMatchEulerDiscrete", {"shift_terminal": 0.1}
    yield "FlowMatchLCM", {"shift": 3.0}
    for name in ("EDMEuler", "EDMDPMSolverMultistep"):
        for ramp in ("karras", "exponential"):
            for kind in ("epsilon", "v_prediction"):
                yield name, {"sigma_schedule": ramp, "prediction_type": kind}


def case_id(case):
    name, options = case
    short = [str(v) if not isinstance(v, bool) else k for k, v in options.items()]
    return "-".join([name, *(s for s in short if s not in ("linear", "0.0001", "0.02"))])


@pytest.mark.parametrize("case", list(cases()), ids=case_id)
def test_snr_is_that_of_what_the_denoiser_is_given(case, monkeypatch):
    """Held against the sampler itself, run with a denoiser that predicts exactly."""
    name, options = case
    scheduler = make(name, **options)
    scheduler.set_timesteps(8)
    found = step_log_snr(scheduler) / np.log(10)
    flow = "flow_prediction" in options.values() or name.startswith("FlowMatch")
    kind = "flow" if flow else options.get("prediction_type", "epsilon")
    with np.errstate(divide="ignore", invalid="ignore"):
        measured = Oracle(scheduler, kind, 16).run(monkeypatch)
    inside = np.abs(measured) < LOG_SNR_LIMIT / np.log(10) - TOLERANCE
    assert inside.sum() >= 6 and np.isfinite(found).all()
    np.testing.assert_allclose(found[inside], measured[inside], atol=TOLERANCE)


def abar_of(kind="linear", total=1000):
    """Write out the product of 1 - beta in float64."""
    if kind == "linear":
        betas = 1e-4 + (0.02 - 1e-4) * np.arange(total) / (total - 1)
    elif kind == "scaled_linear":
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * np.arange(total) / (total - 1)
        betas = root**2
    else:
        level = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(0.999, 1 - level[1:] / level[:-1])
    return np.exp(np.cumsum(np.log1p(-betas)))


def log10_snr(signal, noise):
    with np.errstate(divide="ignore"):
        ratio = 2 * (np.log10(np.asarray(signal)) - np.log10(np.asarray(noise)))
    limit = LOG_SNR_LIMIT / np.log(10)
    return np.clip(ratio, -limit, limit)


def assert_levels(scheduler, signal, noise):
    found = step_log_snr(scheduler) / np.log(10)
    np.testing.assert_allclose(found, log10_snr(signal, noise), atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", ["DDIM", "DDPM", "PNDM", "LCM", "TCD", "DDIMInverse"])
def test_without_sigmas_the_timestep_says_it(name, kind):
    ranges = SCALED if kind == "scaled_linear" else LINEAR
    for spacing in SPACINGS if name != "DDIMInverse" else SPACINGS[:2]:
        scheduler = make(name, **{**ranges, "beta_schedule": kind, "timestep_spacing": spacing})
        scheduler.set_timesteps(7)
        abar = abar_of(kind)[scheduler.timesteps.numpy()]
        assert_levels(scheduler, abar**0.5, (1 - abar) ** 0.5)


def test_zero_terminal_snr():
    scheduler = make("DDIM", **LINEAR, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(7)
    root = abar_of() ** 0.5
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    signal = root[scheduler.timesteps.numpy()]
    assert signal[0] == 0
    assert_levels(scheduler, signal, (1 - signal**2) ** 0.5)


def ramp(kind, high, low, count):
    """Write out a ramp of sigmas between two."""
    at = np.arange(count) / (count - 1)
    if kind == "use_karras_sigmas":
        return (high ** (1 / 7) + at * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if kind == "use_exponential_sigmas":
        return high * (low / high) ** at
    from scipy.stats import beta

    return low + (high - low) * beta.ppf(1 - at, 0.6, 0.6)


@pytest.mark.parametrize("kind", [next(iter(row)) for row in RAMPS[1:]])
@pytest.mark.parametrize("name", ["EulerDiscrete", "LMSDiscrete", "DPMSolverMultistep"])
def test_ramps_of_sigmas(name, kind):
    scheduler = make(name, **LINEAR, **{kind: True})
    scheduler.set_timesteps(9)
    abar = abar_of()
    sigma = ((1 - abar) / abar) ** 0.5
    assert_levels(scheduler, np.ones(9), ramp(kind, sigma[-1], sigma[0], 9))


@pytest.mark.parametrize("kind", ["karras", "exponential"])
@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep"])
@pytest.mark.parametrize("data", [0.5, 1.0])
def test_edm(name, kind, data):
    scheduler = make(name, sigma_schedule=kind, sigma_data=data)
    scheduler.set_timesteps(9)
    sigma = ramp(f"use_{kind}_sigmas", 80.0, 0.002, 9)
    assert_levels(scheduler, 1 / (sigma**2 + data**2) ** 0.5, sigma / (sigma**2 + data**2) ** 0.5)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    np.testing.assert_allclose(schedule.timesteps[[0, -1]], np.log([0.002, 80.0]) / 4)
    np.testing.assert_allclose(schedule.signal**2 * data**2 + schedule.noise**2, 1)
    assert schedule.usual_power == data**2
    # In units of sigma_data it preserves variance: clean where there is no noise, all noise last.
    mse = schedule.expected_mse()
    assert mse[0] < 1e-4 and mse[-1] == pytest.approx(2, rel=0.02)


def shifted(sigma, options, mu):
    if not options.get("use_dynamic_shifting"):
        shift = options.get("shift", options.get("flow_shift", 1.0))
    else:
        shift = mu if options.get("time_shift_type") == "linear" else np.exp(mu)
    return 1 / (1 + (1 / sigma - 1) / shift)


DYNAMIC = {"use_dynamic_shifting": True}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift": 3.0},
        {"shift": 3.0, "invert_sigmas": True},
        {"shift_terminal": 0.1, "shift": 3.0},
        DYNAMIC,
        {**DYNAMIC, "time_shift_type": "linear"},
        {**DYNAMIC, "shift_terminal": 0.02},
        {**DYNAMIC, "use_karras_sigmas": True},
        {**DYNAMIC, "use_exponential_sigmas": True},
        {"shift": 3.0, "use_beta_sigmas": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchLCM"])
def test_flow_matching(name, options, passes):
    steps, tokens = 6, 1024
    scheduler = make(name, **options)
    start_steps(scheduler, steps, Sampling(tokens=tokens, passes_sigmas=passes))
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    low = 0.001
    high = 1.0
    if not passes and not options.get("use_dynamic_shifting"):
        low, high = shifted(np.array([low, high]), options, mu)
    sigma = np.linspace(1, 1 / steps, steps) if passes else np.linspace(high, low, steps)
    sigma = shifted(sigma, options, mu)
    if "shift_terminal" in options:
        sigma = 1 - (1 - sigma) * (1 - options["shift_terminal"]) / (1 - sigma[-1])
    for kind in (next(iter(row)) for row in RAMPS[1:]):
        if options.get(kind):
            sigma = ramp(kind, sigma[0], sigma[-1], steps)
    assert_levels(scheduler, 1 - sigma, sigma)
    names = scheduler.timesteps.numpy() / 1000
    np.testing.assert_allclose(names, 1 - sigma if "invert_sigmas" in options else sigma, atol=1e-5)


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"])
@pytest.mark.parametrize("options", [{}, {"flow_shift": 5.0}, DYNAMIC], ids=str)
def test_flow_sigmas_of_other_solvers(name, options):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = make(name, **flow, **options)
    start_steps(scheduler, 6, Sampling(tokens=256))
    sigma = shifted(np.linspace(1, 0.001, 7)[:-1], options, 0.5)
    # UniPC starts 1e-6 below 1, where ln SNR is that of 1e-6.
    found = step_log_snr(scheduler)
    assert found[0] == pytest.approx(-LOG_SNR_LIMIT, abs=0.5)
    np.testing.assert_allclose(
        found[1:] / np.log(10), log10_snr(1 - sigma, sigma)[1:], atol=TOLERANCE
    )


def test_continuous_timesteps_of_euler():
    """Stable Video Diffusion: v prediction, karras sigmas, ln(sigma) / 4 for a timestep."""
    scheduler = make(
        "EulerDiscrete", **SCALED, timestep_type="continuous", prediction_type="v_prediction",
        use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
    )  # fmt: skip
    scheduler.set_timesteps(9)
    assert_levels(scheduler, np.ones(9), ramp("use_karras_sigmas", 700.0, 0.002, 9))
    schedule = NoiseSchedule.from_scheduler(scheduler)
    level = schedule.index_of(scheduler.timesteps)[2:-4]
    by_level = schedule.index_of_log_snr(step_log_snr(scheduler))[2:-4]
    np.testing.assert_allclose(level, by_level, atol=0.02)


@pytest.mark.parametrize(
    "tokens, steps", [(256, 10), (1024, 28), (4096, 50), (4300, 4), (9000, 28)]
)
def test_the_shift_is_that_of_the_pipelines(tokens, steps):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    from mosaicdiff.trajectory.schedulers import shift_of

    config = make("FlowMatchEulerDiscrete", max_shift=0.9, max_image_seq_len=8192).config
    theirs = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    assert shift_of(config, steps, Sampling(tokens)) == pytest.approx(theirs)
    theirs = compute_empirical_mu(tokens, steps)
    assert shift_of(config, steps, Sampling(tokens, empirical=True)) == pytest.approx(theirs)
