"""Stages follow the real pipelines of flow-matching families, two denoisers included."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

import mosaicdiff
from mosaicdiff import PruneConfig, StagedDenoiser
from mosaicdiff.sources import find_denoisers
from mosaicdiff.trajectory_config import TrajectoryConfig

from .commands import run_json
from .test_clock import CountReads
from .tiny_pipelines import PIPELINES

pytestmark = pytest.mark.models

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
                given = kwargs["timestep"] if "timestep" in kwargs else args[1]
                route.append((index, staged._clock._read(given)))

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


@pytest.mark.parametrize("component", [None, "transformer_2"])
def test_the_command_prunes_both_or_one(component, tmp_path):
    tiny = PIPELINES["wan-2"]
    tiny.whole(tmp_path / "words").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = [f"--pipeline-option={name}={json.dumps(v)}" for name, v in tiny.options.items()]
    asked = [
        tmp_path / "model", "--output", tmp_path / "out", "--activations", "trajectory",
        "--prompts", tmp_path / "prompts.txt", "--trajectories", 2, "--trajectory-batch", 2,
        "--steps", STEPS, "--stages", 2, "--allocation", "uniform", *options,
    ]  # fmt: skip
    chosen = [] if component is None else ["--component", component]
    planned = run_json("prune", *asked, *chosen, "--dry-run")
    values = run_json("prune", *asked, *chosen)
    names = [values["component"], *(other["component"] for other in values["others"])]
    assert names == (["transformer", "transformer_2"] if component is None else [component])
    assert len(planned.get("others", [])) == len(values["others"])
    for report in (values, *values["others"]):
        assert report["sparsity"] == pytest.approx(0.3, abs=0.06)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.transformer_2, StagedDenoiser)
    assert isinstance(loaded.transformer, StagedDenoiser) == (component is None)
