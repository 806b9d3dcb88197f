"""The embedded model retrained with flow matching, kept as a fixture."""

import pytest
import torch

from benchmarks.flow_model import FIXTURE, load_flow_model, record_of
from mosaicdiff import PruneConfig
from mosaicdiff.inputs.load import load_calibration
from mosaicdiff.pipeline import plan
from mosaicdiff.sources import load_pipeline
from mosaicdiff.trajectory.stages import Division

from .mosaicdiff.commands import run, run_json


@pytest.fixture(scope="module")
def flow():
    return load_flow_model()


def test_the_fixture_is_small_and_says_how_it_was_made():
    assert FIXTURE.stat().st_size <= 8_000_000
    assert record_of()["steps"] >= 1000


def test_it_predicts_the_flow(flow):
    """Far better than the mean of the data would, whose error is 1 + P at every sigma."""
    (latents, inputs), *_ = load_calibration(None, load_pipeline("digits"))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(latents.shape, generator=generator)
    for sigma, most in ((0.2, 0.95), (0.5, 0.75), (0.9, 0.75)):
        noisy = (1 - sigma) * latents + sigma * noise
        times = torch.full((len(latents),), 1000 * sigma)
        with torch.no_grad():
            given = flow.transformer(noisy, timestep=times, **inputs).sample
        assert float((given - (noise - latents)).square().mean()) < most


def test_it_is_planned_by_its_scheduler(flow):
    final = plan(flow, PruneConfig(allocation="score"))
    assert [stage.name for stage in final.division.stages] == ["early", "middle", "late"]
    assert final.division.naming == "sigma" and final.steps == (7, 28, 15)
    assert isinstance(final.division, Division)
    assert final.division.stage_of_timestep(900.0) == 0
    assert final.division.stage_of_timestep(100.0) == 2


@pytest.mark.parametrize(
    "options, steps",
    [
        (["--shift", "1"], [7, 28, 15]),
        (["--shift", "3"], [17, 26, 7]),
        (["--shift", "dynamic", "--tokens", "4096"], None),
    ],
)
def test_stages_of_a_flow(options, steps):
    values = run_json("stages", "--schedule", "flow", *options)
    assert [row["name"] for row in values["stages"]] == ["early", "middle", "late"]
    counts = [row["steps"] for row in values["stages"]]
    assert sum(counts) == 50 and min(counts) > 3
    assert steps is None or counts == steps
    assert (values["threshold"], values["snr_weight"]) == (0.55, 0.05)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--shift", "dynamic"], "tokens must be known for a scheduler with use_dynamic_shifting"),
        (["--shift", "0"], "--shift must be a number above 0, or dynamic, got '0'"),
        (["--shift", "much"], "--shift must be a number above 0, or dynamic, got 'much'"),
    ],
)
def test_bad_shifts_are_refused(options, message):
    result = run("stages", "--schedule", "flow", *options)
    assert result.exit_code == 2
    assert message in result.stderr
