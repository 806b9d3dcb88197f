"""Calibration of networks that are pruned in part, and of pipelines that offload."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline
from diffusers.hooks import apply_group_offloading

from mosaicdiff import PruneConfig
from mosaicdiff.groups import input_widths
from mosaicdiff.pipeline import cut
from mosaicdiff.request import prepare
from mosaicdiff.statistics.collect import collect

from .conftest import tiny_batches, tiny_denoiser, tiny_pipeline
from .test_sampled import CPU, LABELS, asked, silent, state_of


def staged_of(job, share):
    config = PruneConfig(
        sparsity=share, allocation="uniform", steps=job.config.steps, stages=job.config.stages
    )
    return cut(job.denoiser, config, scheduler=job.scheduler)


@pytest.mark.parametrize("activations", ["noised", "trajectory"])
def test_a_staged_network_is_seen_where_it_shares_the_dense_modules(activations):
    """Of a network pruned in its first block, the linears of the last see what that leaves."""
    pipe = tiny_pipeline(tiny_denoiser())
    config = replace(asked(steps=6, stages=2), samples=8)
    if activations == "noised":
        config = replace(config, activations=activations, trajectory={})
    prompts = LABELS if activations == "trajectory" else None
    job = prepare(pipe, config, None, tiny_batches(), prompts=prompts)
    widths = {n: w for n, w in input_widths(job.layers).items() if "blocks.2" in n}
    dense = collect(job, job.denoiser, widths, silent)
    first = replace(
        PruneConfig(allocation="explicit", stage_sparsity=(0.6, 0.0), steps=6, stages=2),
        include=("transformer_blocks.0.*",),
    )
    staged = cut(job.denoiser, first, scheduler=job.scheduler)
    before = state_of(pipe)
    pruned = collect(job, staged, widths, silent)
    assert state_of(pipe) == before
    for name in widths:
        early, late = (
            (pruned[k][name].hessian - dense[k][name].hessian).abs().max() for k in (0, 1)
        )
        assert early > 0
        if activations == "noised":  # a sampler passes on what the early stage did
            assert late == 0
    again = collect(job, job.denoiser, widths, silent)
    assert all(torch.equal(again[0][n].hessian, dense[0][n].hessian) for n in widths)


def test_a_linear_that_is_gone_is_named_with_its_stage():
    pipe = tiny_pipeline(tiny_denoiser())
    job = prepare(pipe, asked(steps=6, stages=2), None, None, prompts=LABELS)
    staged = staged_of(job, 0.5)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.to_out\.0.*no sample.*stage-0"):
        collect(job, staged, input_widths(job.layers), silent)


def test_group_offloading_stays_on_and_a_staged_network_is_refused_under_it():
    pipe = tiny_pipeline(tiny_denoiser())
    job = prepare(pipe, asked(), None, None, prompts=LABELS)
    widths = input_widths(job.layers)
    plain = collect(job, job.denoiser, widths, silent)
    staged = staged_of(job, 0.3)
    apply_group_offloading(
        pipe.transformer, onload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )
    hooked = [name for name, m in pipe.transformer.named_modules() if hasattr(m, "_diffusers_hook")]
    got = collect(job, job.denoiser, widths, silent)
    assert all(torch.equal(got[0][name].hessian, plain[0][name].hessian) for name in widths)
    assert hooked == [
        name for name, m in pipe.transformer.named_modules() if hasattr(m, "_diffusers_hook")
    ]
    with pytest.raises(ValueError, match="offloaded by groups"):
        collect(job, staged, widths, silent)
    assert pipe.transformer is job.denoiser


def test_model_offloading_stays_on_for_the_dense_and_a_staged_network():
    plain_pipe = tiny_pipeline(tiny_denoiser())
    config = asked(steps=6, stages=2)
    pipes = (plain_pipe, tiny_pipeline(tiny_denoiser()))
    pipes[1].enable_model_cpu_offload(device="cpu")
    found = []
    for pipe in pipes:
        job = prepare(pipe, config, None, None, prompts=LABELS)
        dense = collect(job, job.denoiser, input_widths(job.layers), silent)
        narrow = replace(
            PruneConfig(allocation="explicit", stage_sparsity=(0.6, 0.3), steps=6, stages=2),
            include=("transformer_blocks.0.*",),
        )
        staged = cut(job.denoiser, narrow, scheduler=job.scheduler)
        last = {n: w for n, w in input_widths(job.layers).items() if "blocks.2" in n}
        found.append((dense, collect(job, staged, last, silent)))
        assert pipe.transformer is job.denoiser
    assert hasattr(pipes[1].transformer, "_hf_hook") and pipes[1]._all_hooks
    assert not hasattr(pipes[0].transformer, "_hf_hook")
    for plain, offloaded in zip(*found, strict=True):
        for a, b in zip(plain, offloaded, strict=True):
            assert all(torch.equal(a[name].hessian, b[name].hessian) for name in a)


def test_weights_on_the_meta_device_are_refused():
    pipe = tiny_pipeline(tiny_denoiser())
    job = prepare(pipe, asked(), None, None, prompts=LABELS)
    with pytest.raises(ValueError, match="meta device.*enable_model_cpu_offload"):
        collect(job, pipe.transformer.to("meta"), {}, silent)


class TwoCalls(DiTPipeline):
    """Guide by two calls of the denoiser, as some pipelines do."""

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=4.0, num_inference_steps=50, generator=None):
        labels = torch.tensor(class_labels)
        latents = torch.randn(len(labels), 2, 8, 8, generator=generator, dtype=torch.float64)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            step = t.expand(len(labels))
            given, null = (
                self.transformer(latents, timestep=step, class_labels=row).sample
                for row in (labels, torch.full_like(labels, 1000))
            )
            noise = null + guidance_scale * (given - null)
            latents = self.scheduler.step(noise, t, latents).prev_sample
        return latents


def test_guidance_by_two_calls_is_as_by_one_of_twice_the_rows():
    found, data = [], []
    for cls in (DiTPipeline, TwoCalls):
        pipe = tiny_pipeline(tiny_denoiser()).to(torch.float64)
        if cls is TwoCalls:
            pipe = TwoCalls(**pipe.components)
        job = prepare(
            pipe, asked(steps=6, stages=3, guidance_scale=4.0), None, None, prompts=LABELS
        )
        found.append(collect(job, job.denoiser, input_widths(job.layers), silent))
        data.append(job.require_data("a test"))
    for one, two in zip(*found, strict=True):
        for name in one:
            assert one[name].weight == pytest.approx(two[name].weight)
            error = (one[name].hessian - two[name].hessian).abs().max()
            assert error <= 1e-9 * one[name].hessian.abs().max()
    assert torch.equal(data[0].inputs["class_labels"], data[1].inputs["class_labels"])
    torch.testing.assert_close(data[0].latents, data[1].latents)
