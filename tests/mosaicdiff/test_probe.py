"""Sampling runs cut in parts, against a loop written out."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from mosaicdiff import PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.allocation.planning import make_frame
from mosaicdiff.statistics.noising import CalibrationSet
from mosaicdiff.trajectory.probe import Probe, latent_error, steps_in_order

from .conftest import linear_scheduler, tiny_batches, tiny_denoiser

SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
]
STEPS = 6


def make_probe(denoiser, scheduler=DDIMScheduler, seed=0, samples=3):
    adapter = adapter_for(denoiser)
    data = CalibrationSet(tiny_batches(), adapter, denoiser)
    made = linear_scheduler(scheduler)
    return Probe(denoiser, adapter, made, data, steps=STEPS, samples=samples, seed=seed)


def written_out(probe, denoiser, kind):
    """Sample as a user would, from the probe's noise, labels and random numbers."""
    scheduler = linear_scheduler(kind)
    scheduler.set_timesteps(STEPS)
    x = probe.start().latents
    for index, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            noise = denoiser(scaled, timestep=t.expand(len(x)), **probe._inputs).sample
        extra = {}
        if kind in (DDPMScheduler, EulerAncestralDiscreteScheduler):
            extra["generator"] = torch.Generator().manual_seed(77_777_777 + index)
        x = scheduler.step(noise, t, x, **extra).prev_sample
    return x


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_run_is_a_sampling_loop(kind):
    denoiser = tiny_denoiser(layers=1)
    probe = make_probe(denoiser, kind)
    run = probe.run([denoiser], [STEPS])
    assert run.step == STEPS
    assert torch.equal(run.latents, written_out(probe, denoiser, kind))
    assert probe.error(run) == 0.0
    assert probe.error(probe.run([denoiser], [STEPS])) == 0.0


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_two_halves_are_a_whole_and_leave_their_start_alone(kind):
    denoiser = tiny_denoiser(layers=1)
    other = tiny_denoiser(layers=1, heads=4)
    for parameter in other.parameters():
        parameter.mul_(0.9)
    probe = make_probe(denoiser, kind)
    half = probe.advance(probe.start(), denoiser, 3)
    latents, memory = half.latents.clone(), repr(half.scheduler.__dict__)
    ends = [probe.advance(half, network, STEPS - 3) for network in (other, denoiser, denoiser)]
    assert torch.equal(half.latents, latents) and repr(half.scheduler.__dict__) == memory
    whole = probe.run([denoiser], [STEPS])
    assert torch.equal(ends[1].latents, whole.latents)
    assert torch.equal(ends[2].latents, whole.latents)
    mixed = probe.run([denoiser, other], [3, STEPS - 3])
    assert torch.equal(ends[0].latents, mixed.latents)
    assert probe.error(mixed) > 0


def test_visited_latents_are_those_of_shorter_runs():
    denoiser = tiny_denoiser(layers=1)
    probe = make_probe(denoiser)
    run = probe.run([denoiser, denoiser], [2, STEPS - 2], visit=True)
    assert len(run.visited) == STEPS
    for count in (1, 2, 4, STEPS):
        short = probe.advance(probe.start(), denoiser, count)
        assert torch.equal(run.visited[count - 1], short.latents)
    assert len(probe.dense(visit=True).visited) == STEPS


def test_a_seed_names_the_noise_and_the_conditions():
    denoiser = tiny_denoiser(layers=1)
    first, again, other = (make_probe(denoiser, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.start().latents, again.start().latents)
    assert not torch.equal(first.start().latents, other.start().latents)


def test_an_eager_denoiser_in_training_samples_as_it_would_else():
    denoiser = tiny_denoiser(layers=1)
    expected = make_probe(denoiser, samples=32).dense().latents
    denoiser.train()  # where labels are dropped at random
    probe = make_probe(denoiser, samples=32)
    assert torch.equal(probe.dense().latents, expected)
    assert denoiser.training


def test_the_error_is_a_share_of_the_energy():
    dense, wrong = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert latent_error(wrong, dense) == pytest.approx(0.25 / 25)


def test_steps_run_through_the_stages_in_order():
    frame = make_frame(linear_scheduler(), PruneConfig(steps=10))
    assert steps_in_order(frame.division, frame.visited)
    assert not steps_in_order(frame.division, np.flip(frame.visited))
