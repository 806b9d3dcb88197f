"""What is recorded of a pipeline is what its denoiser gets."""

import functools
import inspect

import pytest
import torch

from mosaicdiff.adapters import DENOISER_CLASSES, adapter_for
from mosaicdiff.inputs.recorder import record_conditions
from mosaicdiff.statistics.prompts import call_options
from mosaicdiff.trajectory_config import TrajectoryConfig

from ..tiny_pipelines import PIPELINES

#: Families that can be pruned.
KNOWN = [name for name, tiny in PIPELINES.items() if tiny.denoiser_class in DENOISER_CLASSES]
TEXTS = ["a cat", "zzz 9", "a dog b"]


@pytest.fixture(params=KNOWN)
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
    guided = type(pipe).__name__ != "FluxPipeline"  # whose guidance is an input
    assert any(name.startswith("negative_") for name in recorded.inputs) == guided


@pytest.fixture
def sdxl(tmp_path):
    return PIPELINES["sdxl"].whole(tmp_path / "words")


def record(pipe, texts=TEXTS, **options):
    config = TrajectoryConfig(options=options)
    given = call_options(type(pipe).__call__, config)
    return record_conditions(pipe, [pipe.unet], adapter_for(pipe.unet), texts, given, steps=2)


def test_texts_are_encoded_once_and_the_denoiser_does_not_run(sdxl):
    calls = dict.fromkeys(("text_encoder", "unet", "vae"), 0)

    def count(module, args, output, name):
        calls[name] += 1

    for name in calls:
        for module in getattr(sdxl, name).children():
            module.register_forward_hook(functools.partial(count, name=name))
    texts = [f"cat {n}" for n in range(10)]
    whole = record(sdxl, texts)
    assert calls["unet"] == calls["vae"] == 0 and calls["text_encoder"] > 0
    first = dict(calls)
    halves = [record(sdxl, texts[:8]), record(sdxl, texts[8:])]
    assert calls["text_encoder"] == 2 * first["text_encoder"]
    for name, value in whole.inputs.items():
        if not name.startswith("negative_"):
            assert torch.equal(value, torch.cat([half.inputs[name] for half in halves]))


def test_size_and_guidance_are_those_of_the_options(sdxl):
    wide = record(sdxl, height=24, width=32)
    assert wide.size == {"height": 24, "width": 32} and wide.latent_shape == (2, 12, 16)
    assert wide.inputs["time_ids"].tolist() == [[24, 32, 0, 0, 24, 32]] * 3
    alone = record(sdxl, guidance_scale=1.0)
    assert not any(name.startswith("negative_") for name in alone.inputs)
    given = record(sdxl, negative_prompt="b")
    assert given.inputs["negative_encoder_hidden_states"].shape[0] == 1
    assert given.inputs["negative_encoder_hidden_states"].abs().sum() > 0


def test_what_goes_wrong_leaves_the_pipeline_as_it_was(sdxl):
    scheduler = sdxl.scheduler
    with pytest.raises(IndexError, match="batch 1 of 1 failed: IndexError"):
        record(sdxl, clip_skip=9)
    with pytest.raises(RuntimeError, match="on 3 or 6 rows, or twice on 3, got calls of 12 rows"):
        record(sdxl, num_images_per_prompt=2)
    assert sdxl.scheduler is scheduler and "forward" not in sdxl.unet.__dict__
    assert "prepare_latents" not in sdxl.__dict__


def test_a_pipeline_that_ends_without_a_step_is_refused(sdxl):
    # Of no part of the trajectory.
    with pytest.raises(RuntimeError, match="must step its scheduler, but StableDiffusionXLPipe"):
        record(sdxl, denoising_end=1e-9)
