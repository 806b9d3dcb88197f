"""What a picture costs, counted at the calls that are made: every family, every pipeline."""

import pytest
import torch

from mosaicdiff import PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.evaluate import Judges, compare
from mosaicdiff.evaluate.cost import Calls, calls_of, denoiser_size, pipeline_size, watched
from mosaicdiff.pipeline import cut
from mosaicdiff.sources import find_denoisers

from ..conftest import linear_scheduler, tiny_denoiser, tiny_pipeline
from ..family_cases import CASES
from ..tiny_pipelines import PIPELINES
from .test_compare import Bright

EXPLICIT = PruneConfig(sparsity=0.3, stages=2, allocation="score")


def test_calls_are_heard_and_let_go():
    dense = tiny_denoiser()
    calls = [Calls(dense)]
    assert calls[0].macs() == (0.0, 0.0)
    x, t = torch.randn(3, 2, 8, 8), torch.zeros(3)
    with watched(calls):
        dense(x, timestep=t, class_labels=t.long())
        dense(x[:2], timestep=t[:2], class_labels=t[:2].long())
    dense(x, timestep=t, class_labels=t.long())
    macs = adapter_for(dense).macs(dense)
    assert calls[0].samples == 5
    assert calls[0].macs() == (5 * macs.linear, 5 * macs.total)


def test_stages_are_weighed_by_the_plan():
    dense = tiny_denoiser()
    staged = cut(dense, EXPLICIT, scheduler=linear_scheduler())
    calls = [Calls(staged)]
    with watched(calls):
        staged(torch.randn(2, 2, 8, 8), torch.tensor([10, 10]), torch.tensor([1, 2]))
    assert calls[0].macs() == pytest.approx(tuple(2 * value for value in staged.mean_macs()))


def test_sizes_are_those_of_all_denoisers():
    pipe = tiny_pipeline(tiny_denoiser())
    count = sum(p.numel() for p in pipe.transformer.parameters())
    assert pipeline_size(pipe) == denoiser_size(pipe.transformer) == (count, 4 * count)


@pytest.mark.models
@pytest.mark.parametrize("name", CASES)
def test_a_call_of_every_family_is_counted(name):
    """Nothing of a call is read on the way: masks and positions are shapes alone."""
    denoiser = CASES[name].make()
    adapter = adapter_for(denoiser)
    latents, timesteps, inputs = CASES[name].batch()
    inputs = {key: value for key, value in inputs.items() if not key.startswith("negative_")}
    calls = [Calls(denoiser)]
    with watched(calls), torch.no_grad():
        adapter.predict(denoiser, latents, timesteps, inputs)
    linear, total = calls[0].macs()
    assert calls[0].samples == len(latents)
    assert 0 < linear < total


@pytest.mark.models
@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_is_evaluated(name, tmp_path):
    tiny = PIPELINES[name]
    dense, pruned = (tiny.whole(tmp_path / str(number)) for number in range(2))
    for component in find_denoisers(pruned):
        staged = cut(component.denoiser, EXPLICIT, scheduler=pruned.scheduler)
        setattr(pruned, component.name, staged)
    steps = 6 if name == "wan-2" else 2  # enough for both of its denoisers
    heard = []
    found = compare(
        dense, pruned, judges=Judges(prompt_scores=(Bright(),)), prompts=["a cat", "b dog"],
        num_images=2, steps=steps, guidance_scales=(None,), batch_size=1,
        options=tiny.options, advance=heard.append,
    )  # fmt: skip
    one, other = found.pairs[0]
    assert sum(heard) >= 4
    assert one.passes_per_image == other.passes_per_image >= steps
    assert found.ratio(one, other).macs > 1
    assert found.ratio(one, other).macs_with_attention > 1
    assert other.metrics["mse_to_dense"] > 0 and "bright" in one.metrics
    images = found.images["dense", None]
    assert images.ndim == (5 if tiny.frames else 4) and len(images) == 2
    assert any("every frame counts" in note for note in found.notes) == tiny.frames
    assert len(calls_of(dense)) == (2 if name == "wan-2" else 1)
