"""The clock's stage against reading the timestep, as the pipelines of every family call."""

from dataclasses import dataclass

import diffusers
import numpy as np
import pytest
import torch

from mosaicdiff import PruneConfig
from mosaicdiff.allocation.planning import make_frame
from mosaicdiff.trajectory.clock import StageClock
from mosaicdiff.trajectory.schedulers import Sampling, shift_of
from mosaicdiff.trajectory.stages import Division

from .test_clock import CountReads

pytestmark = pytest.mark.models

STEPS, ROWS = 12, 2
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


@dataclass(frozen=True)
class Pipeline:
    """How a pipeline calls: what becomes of t, the calls a step, how it sets the steps."""

    given: callable
    calls: int = 1
    scale: float = 1.0
    sampling: Sampling = Sampling()


def expanded(t):
    return t.expand(ROWS)


def per_token(t):
    """Wan 2.2 5B: the tokens of the picture that a video goes on from have time 0."""
    mask = torch.ones(16)
    mask[:4] = 0
    return (mask * t).unsqueeze(0).expand(ROWS, -1)


PIPELINES = {
    "DiT": Pipeline(lambda t: t[None].expand(ROWS)),
    "PixArt": Pipeline(lambda t: t[None].expand(2 * ROWS)),
    "SDXL": Pipeline(lambda t: t),
    "SD3": Pipeline(expanded),
    "FLUX": Pipeline(
        lambda t: t.expand(ROWS).to(torch.bfloat16) / 1000, 1, 0.001, Sampling(1024, True)
    ),
    "FLUX.2": Pipeline(lambda t: expanded(t) / 1000, 1, 0.001, Sampling(1024, True, True)),
    "Qwen-Image": Pipeline(lambda t: expanded(t) / 1000, 2, 0.001, Sampling(1024, True)),
    "HunyuanVideo": Pipeline(lambda t: expanded(t).float(), 1, 1.0, Sampling(1024, True)),
    "LTX": Pipeline(expanded, 1, 1.0, Sampling(1024, True)),
    "Wan": Pipeline(expanded, 2),
    "Wan 2.2 5B": Pipeline(per_token, 2),
    "Sana": Pipeline(lambda t: expanded(t) * 0.5, 1, 0.5),
}
BY_NUMBER = [
    ("DDIM", LINEAR), ("DDPM", LINEAR), ("DPMSolverMultistep", LINEAR), ("EulerDiscrete", SCALED),
    ("EulerAncestralDiscrete", SCALED), ("HeunDiscrete", SCALED), ("UniPCMultistep", LINEAR),
    ("PNDM", {**SCALED, "skip_prk_steps": True, "steps_offset": 1}), ("LCM", SCALED),
    ("TCD", SCALED), ("LMSDiscrete", SCALED), ("KDPM2Discrete", SCALED),
    ("KDPM2AncestralDiscrete", SCALED), ("DEISMultistep", LINEAR), ("SASolver", LINEAR),
    ("DPMSolverSinglestep", LINEAR),
    ("DPMSolverMultistep", {**LINEAR, "use_karras_sigmas": True}),
]  # fmt: skip
BY_SIGMA = [
    ("FlowMatchEulerDiscrete", {"shift": 3.0}), ("FlowMatchHeunDiscrete", {"shift": 3.0}),
    ("FlowMatchLCM", {"shift": 3.0}), ("UniPCMultistep", FLOW), ("DPMSolverMultistep", FLOW),
]  # fmt: skip
RESOLVED = [
    ("FlowMatchEulerDiscrete", DYNAMIC),
    ("FlowMatchEulerDiscrete", {**DYNAMIC, "shift_terminal": 0.02}),
    ("FlowMatchLCM", DYNAMIC),
]
USUAL = {
    "DiT": [*BY_NUMBER, ("DPMSolverMultistep", FLOW)],
    "PixArt": BY_NUMBER[:3],
    "SDXL": [*BY_NUMBER, ("EDMEuler", {}), ("EDMDPMSolverMultistep", {})],
    "SD3": BY_SIGMA,
    "FLUX": RESOLVED,
    "FLUX.2": RESOLVED[:1],
    "Qwen-Image": RESOLVED[:2],
    "HunyuanVideo": BY_SIGMA[:1],
    "LTX": RESOLVED,
    "Wan": BY_SIGMA,
    "Wan 2.2 5B": BY_SIGMA[:4],
    "Sana": BY_SIGMA,
}
CASES = [(name, *case) for name, cases in USUAL.items() for case in cases]


def run(pipeline, scheduler, ask, start=0):
    """Sample as the pipeline does; `ask` is called for each denoiser call."""
    given = {}
    sampling = pipeline.sampling
    if scheduler.config.get("use_dynamic_shifting"):
        given["mu"] = shift_of(scheduler.config, STEPS, sampling)
    if sampling.passes_sigmas:
        given["sigmas"] = np.linspace(1.0, 1 / STEPS, STEPS)
        scheduler.set_timesteps(device="cpu", **given, num_inference_steps=STEPS)
    else:
        scheduler.set_timesteps(STEPS, device="cpu", **given)
    if sampling.passes_sigmas or start:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
    x = torch.randn(ROWS, 2, 4, 4)
    for t in scheduler.timesteps[start:]:
        z = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        for _ in range(pipeline.calls):
            ask(pipeline.given(t), t)
        x = scheduler.step(0.1 * z, t, x).prev_sample


def make(name, scheduler_name, options):
    scheduler = getattr(diffusers, f"{scheduler_name}Scheduler")(**options)
    pipeline = PIPELINES[name]
    config = PruneConfig(steps=STEPS, stages=3, boundaries=None)
    frame = make_frame(scheduler, config, sampling=pipeline.sampling)
    # In the middle between two steps, so that no rounding of a timestep takes it across.
    levels = np.unique(frame.visited.round(2))
    cuts = [len(levels) // 3, 2 * len(levels) // 3]
    edges = tuple(float(levels[k - 1] + levels[k]) / 2 for k in cuts)
    schedule = frame.schedule
    starts = [int(np.ceil(schedule.index_of_log_snr(edge))) for edge in edges]
    division = Division.at_timesteps(schedule, starts)
    assert all(division.count_steps(frame.visited))
    return pipeline, scheduler, division


@pytest.mark.parametrize("name, scheduler_name, options", CASES, ids=str)
def test_stages_are_those_of_the_timesteps(name, scheduler_name, options):
    pipeline, scheduler, division = make(name, scheduler_name, options)
    clock, reader = (StageClock(division, pipeline.scale) for _ in range(2))
    clock.attach(scheduler)
    route = []

    def ask(given, t):
        route.append((clock.stage_of_call(given), reader.stage_of_call(given)))
        assert route[-1][1] == division.stage_of_timestep(float(t))

    for _ in range(2):
        run(pipeline, scheduler, ask)
    assert len(route) == 2 * pipeline.calls * len(scheduler.timesteps)
    assert [stage for stage, _ in route] == [read for _, read in route]
    assert {stage for stage, _ in route} == {0, 1, 2}


@pytest.mark.parametrize("name, scheduler_name, options", CASES, ids=str)
def test_no_host_read_beyond_the_sampler(name, scheduler_name, options):
    counts = []
    for attached in (False, True):
        pipeline, scheduler, division = make(name, scheduler_name, options)
        clock = StageClock(division, pipeline.scale)
        if attached:
            clock.attach(scheduler)
        with CountReads() as reads:
            run(pipeline, scheduler, lambda given, t: attached and clock.stage_of_call(given))  # noqa: B023
        counts.append(reads.count)
    assert counts[0] == counts[1]


LATE = [
    ("SDXL", "EulerDiscrete", SCALED), ("SDXL", "DDIM", LINEAR), ("SDXL", "EDMEuler", {}),
    ("FLUX", "FlowMatchEulerDiscrete", DYNAMIC), ("SD3", "FlowMatchEulerDiscrete", {"shift": 3.0}),
    ("Sana", "FlowMatchEulerDiscrete", {"shift": 3.0}), ("Wan", "UniPCMultistep", FLOW),
]  # fmt: skip


@pytest.mark.parametrize("name, scheduler_name, options", LATE, ids=str)
def test_a_run_that_begins_late(name, scheduler_name, options):
    pipeline, scheduler, division = make(name, scheduler_name, options)
    clock = StageClock(division, pipeline.scale)
    clock.attach(scheduler)
    route = []
    run(
        pipeline,
        scheduler,
        lambda given, t: route.append((clock.stage_of_call(given), float(t))),
        5,
    )
    assert route == [(division.stage_of_timestep(t), t) for _, t in route]
    assert len(route) == pipeline.calls * (len(scheduler.timesteps) - 5)


@pytest.mark.parametrize("name, scheduler_name, options", LATE, ids=str)
def test_one_attached_in_the_middle_of_a_run_finds_its_place(name, scheduler_name, options):
    """By value, in the units that the pipeline gives: t / 1000, or a multiple."""
    pipeline, scheduler, division = make(name, scheduler_name, options)
    run(pipeline, scheduler, lambda given, t: None)
    clock = StageClock(division, pipeline.scale)
    clock.attach(scheduler)
    t = scheduler.timesteps[7]
    place = clock.place_of_call(pipeline.given(t))
    assert place.position == 7 and place.stage == division.stage_of_timestep(float(t))
