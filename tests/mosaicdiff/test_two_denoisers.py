"""Pipelines with two denoisers: each is pruned for the steps that it is called at."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mosaicdiff
from mosaicdiff import PruneConfig, StagedDenoiser
from mosaicdiff.allocation.planning import make_frame
from mosaicdiff.pipeline import plan
from mosaicdiff.request import prepare
from mosaicdiff.sources import find_component, find_denoisers
from mosaicdiff.statistics.gather import make_probe
from mosaicdiff.trajectory.span import Span
from mosaicdiff.trajectory_config import TrajectoryConfig

from .conftest import flow_scheduler, tiny_batches
from .test_clock import CountReads, record_route
from .two_denoisers import TwoDenoiserPipeline, two_denoiser_pipeline

pytestmark = pytest.mark.models

STEPS = 10
SMALL = {"sparsity": 0.3, "samples": 16, "steps": STEPS, "probe_samples": 8}


def sample(pipe, steps=STEPS):
    return pipe([1, 2], num_inference_steps=steps, generator=torch.Generator().manual_seed(3))[0]


@pytest.fixture
def pruned():
    pipe = two_denoiser_pipeline()
    return pipe, mosaicdiff.prune(pipe, PruneConfig(**SMALL), calibration=tiny_batches())


def test_both_are_pruned_to_the_target_within_their_steps(pruned):
    pipe, result = pruned
    assert result.component == "transformer" and result.pipeline is pipe
    (other,) = result.others
    assert other.component == "transformer_2"
    # Shift 3: sigma = 3 u / (1 + 2 u) is 0.8 at u = 4 / 7, so 4 of 10 steps lie above 0.8.
    counts = [sum(stage.steps for stage in part.report.stages) for part in (result, other)]
    assert counts == [4, 6]
    for part in (result, other):
        assert isinstance(getattr(pipe, part.component), StagedDenoiser)
        assert part.denoiser is getattr(pipe, part.component)
        assert part.report.sparsity == pytest.approx(0.3, abs=0.02)
        assert part.report.component == part.component
        assert json.loads(json.dumps(part.report.to_dict()))["component"] == part.component
        assert all(stage.steps > 0 for stage in part.report.stages)
    firsts = [part.report.stages[-1].first_timestep for part in (result, other)]
    lasts = [part.report.stages[0].last_timestep for part in (result, other)]
    assert firsts[0] == lasts[1] + 1 and firsts[1] == 0 and lasts[0] == 999


def test_both_follow_one_scheduler(pruned):
    pipe, _ = pruned
    routes = [record_route(pipe.transformer), record_route(pipe.transformer_2)]
    sample(pipe)
    for route, model in zip(routes, (pipe.transformer, pipe.transformer_2), strict=True):
        assert route and route == [(model.division.stage_of_timestep(t), t) for _, t in route]
    assert [len(route) for route in routes] == [4, 6]


def test_no_read_beyond_the_dense_pipeline(pruned):
    counts = []
    for pipe in (two_denoiser_pipeline(), pruned[0]):
        with CountReads() as reads:
            sample(pipe)
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_saved_and_loaded(pruned, tmp_path):
    pipe, _ = pruned
    pipe.save_pretrained(tmp_path)
    again = TwoDenoiserPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again), sample(pipe))
    assert again.transformer_2.division == pipe.transformer_2.division
    assert again.transformer_2.division.naming == "sigma"


def test_one_alone(tmp_path):
    pipe = two_denoiser_pipeline()
    dense = pipe.transformer
    result = mosaicdiff.prune(
        pipe, PruneConfig(**SMALL), calibration=tiny_batches(), component="transformer_2"
    )
    assert result.others == () and result.component == "transformer_2"
    assert pipe.transformer is dense and isinstance(pipe.transformer_2, StagedDenoiser)
    final = plan(
        two_denoiser_pipeline(), PruneConfig(**SMALL, allocation="score"),
        calibration=tiny_batches(), component="transformer_2",
    )  # fmt: skip
    assert sum(final.steps) == 6


def test_nothing_changes_where_the_second_fails():
    pipe = two_denoiser_pipeline()
    dense = (pipe.transformer, pipe.transformer_2)

    def fail(what, done, total):
        if what.startswith("transformer_2"):
            raise KeyError("stop")

    with pytest.raises(KeyError):
        mosaicdiff.prune(pipe, PruneConfig(**SMALL), calibration=tiny_batches(), progress=fail)
    assert (pipe.transformer, pipe.transformer_2) == dense


def test_along_the_trajectory_each_sees_its_own_calls():
    pipe = two_denoiser_pipeline()
    trajectory = TrajectoryConfig(samples=4, batch_size=2, guidance_scale=None)
    config = PruneConfig(
        sparsity=0.3, steps=STEPS, activations="trajectory", trajectory=trajectory,
        probe_samples=4, allocation="uniform", stages=2,
    )  # fmt: skip
    rows = []
    for model in (pipe.transformer, pipe.transformer_2):
        hook = lambda module, args, kwargs, rows=rows: rows.append(float(kwargs["timestep"].max()))  # noqa: E731
        model.register_forward_pre_hook(hook, with_kwargs=True)
    result = mosaicdiff.prune(pipe, config, prompts=[1, 2, 3, 4])
    assert [len(part.report.stages) for part in (result, *result.others)] == [2, 2]
    # Two batches of all ten steps for each of the two calibrations.
    assert len(rows) == 2 * 2 * STEPS and {t >= 800 for t in rows} == {True, False}


def test_in_packages_each_keeps_a_state_of_its_own(tmp_path):
    pipe = two_denoiser_pipeline()
    config = PruneConfig(**SMALL, allocation="uniform", packages=2)
    mosaicdiff.prune(pipe, config, calibration=tiny_batches(), state=tmp_path / "state")
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "transformer", "transformer_2",
    ]  # fmt: skip
    again = two_denoiser_pipeline()
    mosaicdiff.prune(again, config, calibration=tiny_batches(), resume=tmp_path / "state")
    assert torch.equal(sample(again), sample(pipe))


def test_the_second_is_measured_from_where_the_first_hands_over():
    pipe = two_denoiser_pipeline()
    job = prepare(pipe, PruneConfig(**SMALL), None, tiny_batches(), component="transformer_2")
    probe = make_probe(job, "a test")
    assert len(probe) == 6 and probe.start().step == 4
    scheduler = flow_scheduler()
    assert type(job.scheduler) is type(scheduler)
    x = probe._noise
    sampler = type(job.scheduler).from_config(job.scheduler.config)
    sampler.set_timesteps(STEPS)
    for index, t in enumerate(sampler.timesteps):
        model = pipe.transformer if index < 4 else pipe.transformer_2
        with torch.no_grad():
            y = model(x, timestep=t.expand(len(x)), **probe._inputs).sample
        x = sampler.step(y, t, x).prev_sample
    assert torch.allclose(probe.dense().latents, x, atol=1e-5)


@pytest.mark.parametrize(
    "options, names",
    [
        ({}, ["transformer", "transformer_2"]),
        ({"ratio": None}, ["transformer"]),
        ({"second": False}, ["transformer"]),
        ({"first": False}, ["transformer_2"]),
    ],
)
def test_what_is_called_is_found(options, names):
    found = find_denoisers(two_denoiser_pipeline(**options))
    assert [part.name for part in found] == names
    spans = {"transformer": Span(at_least=800.0), "transformer_2": Span(below=800.0)}
    for part in found:
        assert part.span == (Span() if options.get("ratio", 1) is None else spans[part.name])


def test_one_that_is_left_of_two_keeps_its_steps():
    pipe = two_denoiser_pipeline(first=False)
    config = PruneConfig(**SMALL, weighting="sensitivity")
    result = mosaicdiff.prune(pipe, config, calibration=tiny_batches())
    assert result.component == "transformer_2" and not result.others
    assert sum(stage.steps for stage in result.report.stages) == 6
    with pytest.raises(ValueError, match="must hold the denoiser of the first 4 steps too"):
        mosaicdiff.prune(
            two_denoiser_pipeline(first=False), PruneConfig(**SMALL), calibration=tiny_batches()
        )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: find_component(p, "unet"), "component must be one of transformer, transf"),
        (
            lambda p: mosaicdiff.prune(p, PruneConfig(**SMALL), measured="x.cal"),
            "component must be one of transformer, transformer_2 with measured",
        ),
        (
            lambda p: mosaicdiff.prune(p.transformer, scheduler=p.scheduler, component="unet"),
            "component must be left out with a bare denoiser, got 'unet'",
        ),
        (
            lambda p: mosaicdiff.prune(
                p, PruneConfig(steps=1, samples=4), calibration=tiny_batches(),
                component="transformer_2",
            ),
            "timesteps that the denoiser is called at, below 800, got 1 from 1000",
        ),
    ],
)  # fmt: skip
def test_bad_requests_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change(two_denoiser_pipeline())


@given(st.floats(0.05, 0.95), st.integers(4, 40), st.floats(1, 8), st.integers(1, 4))
def test_two_spans_share_the_steps_out(ratio, steps, shift, stages):
    scheduler = flow_scheduler(shift=shift)
    config = PruneConfig(steps=steps, stages=stages if stages != 3 else None)
    whole = make_frame(scheduler, PruneConfig(steps=steps))
    seen = []
    for span in (Span(at_least=ratio * 1000), Span(below=ratio * 1000)):
        try:
            frame = make_frame(scheduler, config, span=span)
        except ValueError as error:
            assert "steps must reach" in str(error) or "stages must be at most" in str(error)
            return
        assert all(frame.steps) and sum(frame.steps) == len(frame.visited)
        assert all(len(stage) > 0 for stage in frame.division.stages)
        seen.append(frame.visited)
    np.testing.assert_array_equal(np.concatenate(seen), whole.visited)
