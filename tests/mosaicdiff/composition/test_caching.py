"""diffusers' caches on staged denoisers: same pictures where nothing is skipped, state by stage."""

import numpy as np
import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)

import mosaicdiff
from mosaicdiff.pipeline import cut

from ..cases_a import flux_inputs, latents, tiny_flux
from ..conftest import sample, tiny_batches, tiny_denoiser, tiny_pipeline, tiny_sd3
from ..tiny_pipelines import PIPELINES, ddim, flow_euler, tiny_sana, tiny_unet

#: The first and the last block stay whole, and are one object in all stages.
ENDS = ("transformer_blocks.0", "transformer_blocks.3")


def pruned(**options):
    pipe = tiny_pipeline(tiny_denoiser(4))
    options = {"sparsity": 0.4, "samples": 48, "steps": 20, "exclude": ENDS} | options
    mosaicdiff.prune(pipe, mosaicdiff.PruneConfig(**options), calibration=tiny_batches())
    return pipe


def broadcast(every: int = 2) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )


def taylor(**options) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(
        cache_identifiers=[r"transformer_blocks.*attn1"], cache_interval=2,
        **{"disable_cache_before_step": 1} | options,
    )  # fmt: skip


def calls_of_last_block(denoiser) -> list[int]:
    """Count, from now on, the calls of the last block's FFN, which all stages share."""
    count = [0]
    ff = denoiser.stage_models[0].transformer_blocks[-1].ff
    assert all(stage.transformer_blocks[-1].ff is ff for stage in denoiser.stage_models)
    ff.net[2].register_forward_pre_hook(lambda *args: count.__setitem__(0, count[0] + 1))
    return count


def test_a_cache_that_skips_nothing_changes_nothing():
    pipe = pruned()
    expected = sample(pipe, 9)
    for config in (FirstBlockCacheConfig(0.0), broadcast(1)):
        pipe.transformer.enable_cache(config)
        assert pipe.transformer.is_cache_enabled
        assert np.array_equal(sample(pipe, 9), expected)
        pipe.transformer.disable_cache()
    assert not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize(
    "config", [FirstBlockCacheConfig(0.5), broadcast(), taylor()], ids=lambda c: type(c).__name__
)
def test_a_cache_gives_the_same_picture_again_and_leaves_nothing_behind(config):
    pipe = pruned()
    denoiser, expected = pipe.transformer, sample(pipe, 9)
    parts = {name: (module, dict(module.__dict__)) for name, module in denoiser.named_modules()}
    denoiser.enable_cache(config)
    first, second = sample(pipe, 9), sample(pipe, 9)
    assert 0 < np.abs(first - expected).max() < 0.2
    assert np.array_equal(first, second)  # nothing of the first picture is left in the second
    denoiser.disable_cache()
    assert np.array_equal(sample(pipe, 9), expected)
    for name, module in denoiser.named_modules():
        before, state = parts[name]
        assert module is before
        assert module is denoiser or module.__dict__.keys() == state.keys(), name


def test_the_first_step_of_a_stage_is_computed_in_full():
    pipe = pruned()
    count = calls_of_last_block(pipe.transformer)
    sample(pipe, 9)
    assert count == [9]
    pipe.transformer.enable_cache(FirstBlockCacheConfig(1e9))
    for run in (1, 2):
        sample(pipe, 9)
        assert count == [9 + 3 * run]  # one call of each of three stages


def test_stages_that_run_in_their_own_loop_forget_too():
    """No pipeline resets anything here; another run and another stage do."""
    pipe = pruned(stages=1)
    denoiser = pipe.transformer
    count = calls_of_last_block(denoiser)
    denoiser.enable_cache(FirstBlockCacheConfig(1e9))
    x, label = torch.randn(2, 2, 8, 8), torch.tensor([1, 2])
    for run in (1, 2):
        pipe.scheduler.set_timesteps(4)
        for t in pipe.scheduler.timesteps:
            noise = denoiser(x, t.expand(2), label).sample
            pipe.scheduler.step(noise, t, x)
        assert count == [run]


def test_whole_blocks_that_are_gone_are_skipped_over():
    pipe = pruned(granularity="blocks", exclude=(), sparsity=0.4875)
    kinds = {type(b).__name__ for s in pipe.transformer.stage_models for b in s.transformer_blocks}
    assert "BiasOnlyBlock" in kinds
    expected = sample(pipe, 9)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(0.0))
    assert np.array_equal(sample(pipe, 9), expected)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(0.5))
    assert np.isfinite(sample(pipe, 9)).all()


def staged_flux(stages: int = 2, **options):
    config = mosaicdiff.PruneConfig(
        sparsity=0.3, allocation="score", stages=stages, steps=4, **options
    )
    return cut(tiny_flux(), config, scheduler=flow_euler())


def test_the_calls_of_a_step_keep_apart():
    denoiser = staged_flux(1)
    denoiser.enable_cache(FirstBlockCacheConfig(1e9))
    x = latents(2, 12, 8)
    calls = {"cond": flux_inputs(2, seed=1), "uncond": flux_inputs(2, seed=2)}
    found = {}
    with torch.no_grad():
        for step in range(2):
            for name, inputs in calls.items():
                inputs = inputs | {"img_ids": inputs["img_ids"][0], "txt_ids": torch.zeros(5, 3)}
                with denoiser.cache_context(name):
                    out = denoiser(x, timestep=torch.full((2,), 0.6), **inputs).sample
                assert step == 0 or torch.allclose(out, found[name], atol=1e-6)
                found[name] = out
    assert (found["cond"] - found["uncond"]).abs().max() > 1e-3


def test_a_cache_with_one_memory_refuses_two_calls_of_a_step():
    denoiser = staged_flux(1)
    denoiser.enable_cache(broadcast())
    with denoiser.cache_context("cond"):
        pass
    with pytest.raises(ValueError, match="calls of a run must be of one context, got 'cond' and"):
        with denoiser.cache_context("uncond"):
            pass


def test_a_call_without_a_context_is_refused_where_pipelines_name_it():
    denoiser = staged_flux(1)
    denoiser.enable_cache(FirstBlockCacheConfig(0.1))
    inputs = flux_inputs(2)
    inputs |= {"img_ids": inputs["img_ids"][0], "txt_ids": torch.zeros(5, 3)}
    with pytest.raises(ValueError, match="No cache context"):
        denoiser(latents(2, 12, 8), timestep=torch.full((2,), 0.6), **inputs)


def staged(denoiser, scheduler, stages=2):
    config = mosaicdiff.PruneConfig(sparsity=0.3, allocation="score", stages=stages, steps=4)
    return cut(denoiser, config, scheduler=scheduler)


@pytest.mark.parametrize(
    "make, config, message",
    [
        (
            lambda: staged_flux(),
            TextKVCacheConfig(),
            "must be one of FasterCacheConfig, .*got Text",
        ),
        (lambda: staged_flux(), MagCacheConfig(calibrate=True), "ratios count the steps"),
        (lambda: staged_flux(), FasterCacheConfig(), "a new stage has none"),
        (lambda: staged_flux(), taylor(disable_cache_after_step=3), "disable_cache_after_step"),
        (lambda: staged_flux(), taylor(), None),
        (lambda: staged(tiny_unet(), ddim()), FirstBlockCacheConfig(), "use DeepCache"),
        (lambda: staged(tiny_sd3(4), flow_euler()), FirstBlockCacheConfig(), "returns no text"),
        (lambda: staged(tiny_sana(), flow_euler()), FirstBlockCacheConfig(), "blocks return"),
        (
            lambda: staged(tiny_unet(), ddim()),
            TaylorSeerCacheConfig(use_lite_mode=True),
            "Leave use_lite_mode out",
        ),
        (
            lambda: staged_flux(),
            TaylorSeerCacheConfig(cache_identifiers=["nothing"]),
            "found none. Give it their identifiers",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused_and_changes_nothing(make, config, message):
    denoiser = make()
    before = [id(module) for module in denoiser.modules()]
    if message is None:  # attentions of FLUX are `attn`
        message = "found none"
    with pytest.raises(ValueError, match=message):
        denoiser.enable_cache(config)
    assert [id(module) for module in denoiser.modules()] == before
    assert not any("_diffusers_hook" in module.__dict__ for module in denoiser.modules())
    assert not denoiser.is_cache_enabled


def test_magcache_with_one_stage():
    pipe = pruned(stages=1)
    expected = sample(pipe, 9)
    count = calls_of_last_block(pipe.transformer)
    ratios = torch.ones(9)
    pipe.transformer.enable_cache(
        MagCacheConfig(mag_ratios=ratios, num_inference_steps=9, threshold=0.5)
    )
    first, second = sample(pipe, 9), sample(pipe, 9)
    assert np.array_equal(first, second) and 0 < np.abs(first - expected).max() < 0.2
    assert 2 <= count[0] < 18 and count[0] % 2 == 0


def test_a_second_cache_and_none_to_disable_are_refused():
    denoiser = staged_flux()
    with pytest.warns(UserWarning, match="disable_cache: no cache is on"):
        denoiser.disable_cache()
    denoiser.enable_cache(FirstBlockCacheConfig(0.1))
    with pytest.raises(ValueError, match=r"no cache must be on, got First.*disable_cache\(\)"):
        denoiser.enable_cache(broadcast())


def test_a_compiled_denoiser_is_refused():
    denoiser = staged_flux()
    denoiser.compile()
    with pytest.raises(ValueError, match="must not be compiled yet"):
        denoiser.enable_cache(FirstBlockCacheConfig(0.1))


@pytest.mark.models
@pytest.mark.parametrize("name", PIPELINES)
def test_whole_pipelines_sample_with_caches(name, tmp_path):
    tiny = PIPELINES[name]
    pipe = tiny.whole(tmp_path / "words")
    denoiser = staged(getattr(pipe, tiny.component), tiny.schedulers[0]())
    setattr(pipe, tiny.component, denoiser)
    expected = tiny.sample(pipe, steps=6)
    blocks = tiny.denoiser_class not in (
        "SD3Transformer2DModel", "SanaTransformer2DModel", "UNet2DConditionModel"
    )  # fmt: skip
    twice = name in ("qwen-image", "wan", "wan-2")
    configs = [FirstBlockCacheConfig(0.0), FirstBlockCacheConfig(0.5)] if blocks else []
    configs += [] if twice else [broadcast()]
    for config in configs:
        denoiser.enable_cache(config)
        first, second = tiny.sample(pipe, steps=6), tiny.sample(pipe, steps=6)
        assert torch.equal(first, second)
        assert torch.equal(first, expected) == (getattr(config, "threshold", 1) == 0)
        denoiser.disable_cache()
    assert torch.equal(tiny.sample(pipe, steps=6), expected)
