"""The calls that diffusers' own pipelines make, as adapters read them and make them again."""

import pytest
import torch
from diffusers import (
    Flux2Pipeline,
    FluxPipeline,
    HunyuanVideoPipeline,
    QwenImagePipeline,
)

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.pipeline import cut
from mosaicdiff.trajectory_config import TrajectoryConfig

from .cases_a import tiny_flux, tiny_flux2, tiny_hunyuan, tiny_qwen
from .conftest import flow_scheduler

pytestmark = pytest.mark.models

pytest.importorskip("transformers", reason="diffusers' pipelines of these need transformers")

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def texts(scale=1.0, length=5):
    generator = torch.Generator().manual_seed(14)
    long = torch.randn(2, 5, 12, generator=generator)[:, :length]
    return scale * long, scale * torch.randn(2, 10, generator=generator)


def bare(pipeline_class, model, scheduler, **none):
    """A pipeline without text encoders and VAE: it is given encodings and returns latents."""
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae", *none))
    pipeline = pipeline_class(transformer=model, scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


TWO = dict.fromkeys(("text_encoder_2", "tokenizer_2"))


def dynamic():
    return flow_scheduler(use_dynamic_shifting=True)


def run_flux(model, guided=False, **options):
    embeds, pooled = texts()
    if guided:
        other, other_pooled = texts(0.5)
        options |= {"negative_prompt_embeds": other, "true_cfg_scale": 2.0,
                    "negative_pooled_prompt_embeds": other_pooled}  # fmt: skip
    pipeline = bare(FluxPipeline, model, dynamic(), **TWO)
    return pipeline, {
        "prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "height": 48, "width": 64,
    } | options  # fmt: skip


def run_flux2(model, **options):
    pipeline = bare(Flux2Pipeline, model, dynamic())
    return pipeline, {"prompt_embeds": texts()[0], "height": 48, "width": 64} | options


def run_qwen(model, guided=False, **options):
    if guided:  # an empty prompt is shorter
        options |= {"negative_prompt_embeds": texts(0.5, 3)[0], "true_cfg_scale": 2.0,
                    "negative_prompt_embeds_mask": MASK[:, :3]}  # fmt: skip
    pipeline = bare(QwenImagePipeline, model, dynamic())
    return pipeline, {
        "prompt_embeds": texts()[0], "prompt_embeds_mask": MASK, "height": 48, "width": 64,
    } | options  # fmt: skip


def run_hunyuan(model, **options):
    embeds, pooled = texts()
    pipeline = bare(HunyuanVideoPipeline, model, flow_scheduler(shift=7.0), **TWO)
    return pipeline, {
        "prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_attention_mask": MASK,
        "height": 32, "width": 48, "num_frames": 5,
    } | options  # fmt: skip


RUNS = {
    "flux": (tiny_flux, run_flux, {}),
    "flux guided": (tiny_flux, run_flux, {"guided": True}),
    "flux-schnell": (lambda: tiny_flux(guidance=False), run_flux, {}),
    "flux.2": (tiny_flux2, run_flux2, {}),
    "qwen-image": (tiny_qwen, run_qwen, {}),
    "qwen-image guided": (tiny_qwen, run_qwen, {"guided": True}),
    "hunyuan-video": (tiny_hunyuan, run_hunyuan, {}),
}


def sample(pipeline, options, steps=4):
    return pipeline(
        **options, num_inference_steps=steps, output_type="latent",
        generator=torch.manual_seed(3), return_dict=False,
    )[0]  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_call_is_made_again_from_its_conditions(name):
    make, run, how = RUNS[name]
    model = make()
    pipeline, options = run(model, **how)
    adapter, calls, times = adapter_for(model), [], []
    model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda noise, t, *args, **kwargs: (
        times.append(t) or step(noise, t, *args, **kwargs)
    )
    sample(pipeline, options)
    per_step = 2 if how.get("guided") else 1
    assert len(calls) == 4 * per_step and len(times) == 4
    for index, (given, output) in enumerate(list(calls)):
        latents, t = given["hidden_states"], times[index // per_step]
        inputs = adapter.conditions_of({"self": model, **given})
        adapter.check_inputs(model, latents, inputs)
        with torch.no_grad():
            again = adapter.predict(model, latents, t.expand(len(latents)), inputs)
            assert torch.equal(again, output)
            if inputs.pop("txt_ids", None) is not None:  # they are made where there are none
                again = adapter.predict(model, latents, t.expand(len(latents)), inputs)
                assert torch.equal(again, output)


@pytest.mark.parametrize("name", RUNS)
def test_stages_follow_the_pipeline(name):
    """The route is that of reading what the denoiser is given, attached or not."""
    make, run, how = RUNS[name]
    pipeline, options = run(make(), **how)
    config = PruneConfig(sparsity=0.3, allocation="score", stages=3, steps=12, whole_ends=False)
    staged = cut(pipeline.transformer, config, scheduler=pipeline.scheduler)
    pipeline.register_modules(transformer=staged)
    route = []
    for index, stage in enumerate(staged.stage_models):

        def note(module, args, kwargs, index=index):
            sigma = float(kwargs["timestep"][0]) / adapter_sigma
            snr = 2 * torch.log(torch.tensor(max(1 - sigma, 1e-9) / sigma))
            route.append((index, int((torch.tensor(staged.division.boundaries) < snr).sum())))

        stage.register_forward_pre_hook(note, with_kwargs=True)
    adapter_sigma = staged.adapter.sigma_scale
    attached = sample(pipeline, options, steps=12)
    assert [stage for stage, _ in route] == [read for _, read in route]
    # A shift of the sampler may leave the late stage no step at 12: then there are two.
    assert {stage for stage, _ in route} == set(range(len(staged.stage_models))) >= {0, 1}
    staged.detach()
    assert torch.equal(sample(pipeline, options, steps=12), attached)


class Spelled(QwenImagePipeline):
    """A QwenImagePipeline whose text encoder makes a token of every letter."""

    def _get_qwen_prompt_embeds(self, prompt=None, device=None, dtype=None):
        texts = [prompt] if isinstance(prompt, str) else prompt
        table = torch.randn(128, 12, generator=torch.Generator().manual_seed(2))
        length = max(map(len, texts))
        mask = torch.tensor([[int(i < len(text)) for i in range(length)] for text in texts])
        tokens = torch.tensor([list(text.ljust(length).encode()) for text in texts])
        return table[tokens], mask


def test_prompts_of_any_length_are_sampled_with_and_measured_on():
    """Qwen-Image pads the prompts of a batch alone, and masks nothing where they are alike."""
    options = {
        "height": 48, "width": 64,
        "true_cfg_scale": 2.0, "negative_prompt": ["ab", "ab"],
    }  # fmt: skip
    pipeline = bare(Spelled, tiny_qwen(), dynamic())
    config = PruneConfig(
        sparsity=0.2, steps=4, stages=1, activations="trajectory", whole_ends=False,
        weighting="sensitivity", probe_samples=4, allocation="optimal",
        trajectory=TrajectoryConfig(samples=6, batch_size=2, options=options),
    )  # fmt: skip
    prompts = ["tree", "frog", "a", "house", "two", "cat"]
    result = mosaicdiff.prune(pipeline, config, prompts=prompts)
    assert result.report.sparsity == pytest.approx(0.2, abs=0.01)
    assert isinstance(pipeline.transformer, mosaicdiff.StagedDenoiser)
