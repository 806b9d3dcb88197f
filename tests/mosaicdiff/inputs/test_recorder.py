"""What is recorded of a pipeline is what its denoiser gets."""

import inspect

import pytest
import torch

from mosaicdiff.adapters import adapter_for
from mosaicdiff.inputs.recorder import record_conditions
from mosaicdiff.statistics.prompts import call_options
from mosaicdiff.trajectory_config import TrajectoryConfig

from ..tiny_pipelines import PIPELINES

TEXTS = ["a cat", "zzz 9", "a dog b"]


@pytest.fixture(params=PIPELINES)
def whole(request, tmp_path):
    tiny = PIPELINES[request.param]
    pipe = tiny.whole(tmp_path / "words")
    denoiser = getattr(pipe, tiny.component)
    options = call_options(type(pipe).__call__, TrajectoryConfig(options=tiny.options))
    return tiny, pipe, denoiser, adapter_for(denoiser), options


def real_calls(tiny, pipe, denoiser, text):
    """Named arguments of the denoiser's calls, with real text encoders, of one text."""
    calls = []

    def note(module, args, kwargs):
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        calls.append(dict(given))

    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        tiny.sample(pipe, [text], steps=2, output_type="latent")
    finally:
        handle.remove()
    return calls


def test_conditions_are_those_of_a_real_run(whole):
    tiny, pipe, denoiser, adapter, options = whole
    others = [m for m in (denoiser, getattr(pipe, "transformer_2", None)) if m is not None]
    before = tiny.sample(pipe)
    scheduler, held = pipe.scheduler, set(pipe.__dict__)
    recorded = record_conditions(pipe, others, adapter, TEXTS, options, steps=2)
    assert pipe.scheduler is scheduler and set(pipe.__dict__) <= held | {"_interrupt"}
    assert "forward" not in denoiser.__dict__ and "step" not in scheduler.__dict__
    for row, text in enumerate(TEXTS):
        first, *rest = real_calls(tiny, pipe, denoiser, text)
        found = adapter.conditions_of(first)
        latents = next(v for k, v in first.items() if k != "self")
        guided = len(latents) == 2
        assert recorded.latent_shape == tuple(latents.shape[1:])
        second = found if guided else adapter.conditions_of(rest[0])
        for condition in adapter.conditions:
            if condition.name not in found:
                continue
            wanted = found[condition.name][-1]
            size = tuple(slice(0, n) for n in wanted.shape)  # the rest is padding
            torch.testing.assert_close(recorded.inputs[condition.name][row][size], wanted)
            if condition.null and condition.negative in recorded.inputs:
                null = recorded.inputs[condition.negative]
                wanted = second[condition.name][0]
                size = tuple(slice(0, n) for n in wanted.shape)
                got = null[row if len(null) > 1 else 0][size]
                torch.testing.assert_close(got, wanted)
    assert torch.equal(tiny.sample(pipe), before)  # the pipeline is as it was
