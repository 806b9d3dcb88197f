"""Stages follow the real pipelines of flow-matching families, two denoisers included."""

import pytest
import torch
from diffusers import DiffusionPipeline

import mosaicdiff
from mosaicdiff import PruneConfig, StagedDenoiser
from mosaicdiff.sources import find_denoisers
from mosaicdiff.trajectory_config import TrajectoryConfig

from .test_clock import CountReads
from .tiny_pipelines import PIPELINES

PROMPTS = ["a cat", "a dog"]
STEPS = 8


def config_for(tiny, **more):
    given = {"sparsity": 0.3, "steps": STEPS, "stages": 2, "whole_ends": False}
    trajectory = TrajectoryConfig(samples=2, batch_size=2, options=tiny.options)
    return PruneConfig(
        activations="trajectory", allocation="uniform", trajectory=trajectory, **given | more
    )


def routes_of(pipe):
    """Note the stage of every call, and what reading the timestep would say."""
    route = []
    for part in find_denoisers(pipe):
        staged = part.denoiser
        for index, model in enumerate(staged.stage_models):

            def note(module, args, kwargs, index=index, staged=staged):
                route.append((index, staged._clock._read(kwargs["timestep"])))

            model.register_forward_pre_hook(note, with_kwargs=True)
    return route


@pytest.mark.parametrize("name", ["sdxl", "flux", "wan", "wan-2", "sd3", "pixart-sigma"])
def test_stages_are_those_of_the_timesteps(name, tmp_path):
    tiny = PIPELINES[name]
    pipe = tiny.whole(tmp_path / "words")
    pipe.set_progress_bar_config(disable=True)
    for scheduler in tiny.schedulers:
        pipe.scheduler = scheduler()
        with CountReads() as reads:
            tiny.sample(pipe, steps=STEPS)
        dense = reads.count
        result = mosaicdiff.prune(pipe, config_for(tiny), prompts=PROMPTS)
        assert all(part.report.sparsity > 0.2 for part in (result, *result.others))
        with CountReads() as reads:
            tiny.sample(pipe, steps=STEPS)
        assert reads.count == dense
        route = routes_of(pipe)
        tiny.sample(pipe, steps=STEPS)
        assert route and [stage for stage, _ in route] == [read for _, read in route]
        assert {stage for stage, _ in route} == {0, 1}
        pipe = tiny.whole(tmp_path / f"words-{scheduler.__name__}")
        pipe.set_progress_bar_config(disable=True)


def test_both_denoisers_of_wan_are_saved_and_loaded(tmp_path):
    tiny = PIPELINES["wan-2"]
    pipe = tiny.whole(tmp_path / "words")
    mosaicdiff.prune(pipe, config_for(tiny), prompts=PROMPTS)
    pipe.save_pretrained(tmp_path / "model")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.transformer, StagedDenoiser)
    assert isinstance(loaded.transformer_2, StagedDenoiser)
    assert (tiny.sample(pipe, steps=STEPS) - tiny.sample(loaded, steps=STEPS)).abs().max() < 1e-5
    assert torch.isfinite(tiny.sample(loaded, steps=STEPS)).all()
