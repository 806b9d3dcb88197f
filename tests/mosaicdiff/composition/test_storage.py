"""Casting, quantising and offloading: what stages share once, numbers close, names of refusals."""

import copy
import sys

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_submodules
from diffusers.hooks import FirstBlockCacheConfig

import mosaicdiff
from mosaicdiff.pipeline import cut

from ..conftest import sample, tiny_denoiser, tiny_pipeline
from ..tiny_pipelines import PIPELINES
from .test_caching import broadcast, pruned


def whole_blocks_gone():
    return pruned(granularity="blocks", exclude=(), sparsity=0.4875)


def bytes_of(model) -> int:
    """Bytes of all parameters, each once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def error(pipe, expected) -> float:
    return float(np.abs(sample(pipe, 9) - expected).max())


@pytest.mark.parametrize("make", [pruned, whole_blocks_gone])
@pytest.mark.parametrize("way", ["model", "sequential", "group"])
def test_offloaded_denoisers_sample_the_same(make, way):
    pipe = make()
    denoiser, cpu = pipe.transformer, torch.device("cpu")
    expected = sample(pipe, 9)
    if way == "model":
        cpu_offload_with_hook(denoiser, cpu)
    elif way == "sequential":
        cpu_offload(denoiser, cpu, offload_buffers=True)
        assert all(parameter.is_meta for parameter in denoiser.parameters())
    else:
        denoiser.enable_group_offload(cpu, cpu, offload_type="leaf_level")
        assert any("_diffusers_hook" in m.__dict__ for m in denoiser.modules())
    assert error(pipe, expected) == 0
    if way == "sequential":
        with pytest.raises(ValueError, match="must be in memory, but it is offloaded"):
            mosaicdiff.load_lora(pipe, {})
        with pytest.raises(ValueError, match="Enable the cache first and offload afterwards"):
            denoiser.enable_cache(FirstBlockCacheConfig(0.1))
        remove_hook_from_submodules(denoiser)
        assert not any(parameter.is_meta for parameter in denoiser.parameters())
        assert error(pipe, expected) == 0


def test_a_cached_denoiser_is_offloaded_too():
    pipe = pruned()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(0.5))
    expected = sample(pipe, 9)
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert error(pipe, expected) == 0


def test_offloading_by_blocks_is_refused():
    with pytest.raises(ValueError, match="must be 'leaf_level' .*got 'block_level'"):
        pruned().transformer.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1)


def test_casting_takes_the_layers_that_diffusers_takes():
    pipe, dense = pruned(), tiny_denoiser(4)
    expected = sample(pipe, 9)
    denoiser, before = pipe.transformer, bytes_of(pipe.transformer)
    denoiser.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    dense.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    wanted = {n: p.dtype for n, p in dense.named_parameters()}
    for stage in denoiser.stage_models:
        for name, parameter in stage.named_parameters():
            if name in wanted:
                assert parameter.dtype == wanted[name], name
    assert torch.float8_e4m3fn in {p.dtype for p in denoiser.parameters()}
    assert bytes_of(denoiser) < 0.9 * before  # most of the tiny model are embedders, left out
    assert 0 < error(pipe, expected) < 0.1
    with pytest.raises(ValueError, match="layerwise casting has rounded them"):
        denoiser.enable_layerwise_casting()
    with pytest.raises(ValueError, match="layerwise casting has rounded them"):
        mosaicdiff.load_lora(pipe, {})
    with pytest.raises(ValueError, match="save_pretrained: .* casting has rounded them"):
        pipe.save_pretrained("never")


def test_a_cast_denoiser_is_cached_too():
    pipe = pruned()
    denoiser = pipe.transformer
    denoiser.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    expected = sample(pipe, 9)
    denoiser.enable_cache(FirstBlockCacheConfig(0.0))
    assert error(pipe, expected) == 0
    denoiser.disable_cache()
    assert error(pipe, expected) == 0


def test_swapped_and_optimized_denoisers_are_refused():
    pipe = pruned()
    denoiser = pipe.transformer
    calls = {
        "enable_cache": lambda: denoiser.enable_cache(broadcast()),
        "enable_layerwise_casting": denoiser.enable_layerwise_casting,
        "load_lora": lambda: mosaicdiff.load_lora(pipe, {}),
        "unload_lora": lambda: mosaicdiff.unload_lora(pipe),
    }
    mosaicdiff.optimize(pipe)
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"{name}: .* Call mosaicdiff\.restore first"):
            call()
    mosaicdiff.restore(pipe)
    denoiser.set_stage_memory("swap")
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"{name}: stage_memory must be 'resident'"):
            call()
    denoiser.set_stage_memory("resident")
    denoiser.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="must be 'resident' while a cache is on, got 'swap'"):
        denoiser.set_stage_memory("swap")


def test_cast_weights_are_not_swapped():
    denoiser = pruned().transformer
    denoiser.enable_layerwise_casting()
    with pytest.raises(ValueError, match="set_stage_memory: .* layerwise casting has rounded"):
        denoiser.set_stage_memory("swap")


def test_first_block_cache_goes_on_top_of_fused_execution():
    pipe = pruned()
    expected = sample(pipe, 9)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(0.5))
    cached = sample(pipe, 9)
    with pytest.raises(ValueError, match="must be without hooks, but fbc_leader_block_hook"):
        mosaicdiff.optimize(pipe)
    pipe.transformer.disable_cache()
    mosaicdiff.optimize(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(0.5))
    assert error(pipe, cached) < 1e-5 < error(pipe, expected)
    with pytest.raises(ValueError, match="restore: .* must be without hooks"):
        mosaicdiff.restore(pipe)
    pipe.transformer.disable_cache()
    mosaicdiff.restore(pipe)
    assert error(pipe, expected) == 0
    mosaicdiff.optimize(pipe, compile=True)
    with pytest.raises(ValueError, match="compiled and captured networks do not call"):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(0.5))


def test_a_lora_is_optimized_afterwards():
    pipe = pruned()
    name = "transformer_blocks.0.attn1.to_q"
    lora = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    mosaicdiff.load_lora(pipe, lora, scale=0.1)
    expected = sample(pipe, 9)
    mosaicdiff.optimize(pipe)
    assert error(pipe, expected) < 1e-5
    mosaicdiff.restore(pipe)
    mosaicdiff.unload_lora(pipe)
    assert error(pipe, expected) > 1e-4


def test_int8_weights():
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    pipe = pruned()
    denoiser = pipe.transformer
    expected = sample(pipe, 9)
    mosaicdiff.quantize(pipe, torchao.Int8WeightOnlyConfig())
    name = "transformer_blocks.0.norm1.linear"
    first, second = (s.get_submodule(name).weight for s in denoiser.stage_models[:2])
    assert first is second and type(first.data) is not torch.Tensor
    assert 0 < error(pipe, expected) < 0.1
    with pytest.raises(ValueError, match="save_pretrained: .* but it is quantised"):
        pipe.save_pretrained("never")
    with pytest.raises(ValueError, match="quantize: .* but it is quantised"):
        mosaicdiff.quantize(pipe, torchao.Int8WeightOnlyConfig())
    denoiser.enable_cache(FirstBlockCacheConfig(0.5))
    assert error(pipe, expected) < 0.1


def test_what_quantize_refuses(monkeypatch):
    with pytest.raises(ValueError, match="must hold a pruned denoiser, got none"):
        mosaicdiff.quantize(tiny_pipeline(tiny_denoiser()), None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(RuntimeError, match=r"torchao must be installed.*mosaicdiff\[compose\]"):
        mosaicdiff.quantize(pruned(), None)


@pytest.fixture
def unet(tmp_path):
    def make(stages):
        tiny = PIPELINES["sd15"]
        pipe = tiny.whole(tmp_path / "words")
        config = mosaicdiff.PruneConfig(sparsity=0.3, allocation="score", stages=stages, steps=6)
        pipe.unet = cut(pipe.unet, config, scheduler=pipe.scheduler)
        return tiny, pipe

    return make


@pytest.mark.parametrize("stages", [1, 3])
def test_deepcache(unet, stages):
    pytest.importorskip("DeepCache", reason="needs DeepCache")
    from mosaicdiff.composition.deepcache import DeepCacheHelper

    tiny, pipe = unet(stages)
    expected = tiny.sample(pipe, steps=9)
    before = [id(module) for module in pipe.unet.modules()]
    helper = DeepCacheHelper(pipe)
    with pytest.raises(ValueError, match="cache_interval must be at least 1, got 0"):
        helper.set_params(cache_interval=0)
    helper.set_params(cache_interval=1)
    helper.enable()
    assert torch.equal(tiny.sample(pipe, steps=9), expected)
    with pytest.raises(ValueError, match="must be off, but is on"):
        helper.enable()
    helper.disable()
    counts = [0]
    for stage in pipe.unet.stage_models:
        original = stage.mid_block.resnets[0]
        stage.mid_block.resnets[0] = copy.copy(original)
        stage.mid_block.resnets[0].register_forward_pre_hook(
            lambda *args: counts.__setitem__(0, counts[0] + 1)
        )
    helper.set_params(cache_interval=100)
    helper.enable()
    first = tiny.sample(pipe, steps=9)
    entered = counts[0]
    second = tiny.sample(pipe, steps=9)
    assert torch.equal(first, second)
    assert 0 < (first - expected).abs().max() < 0.5
    assert stages <= entered < 9 and counts[0] == 2 * entered
    helper.disable()
    assert torch.equal(tiny.sample(pipe, steps=9), expected)
    assert len(before) == len(list(pipe.unet.modules()))
    assert not any("forward" in module.__dict__ for module in pipe.unet.stage_models.modules())
    with pytest.raises(ValueError, match="must be on, but is off"):
        helper.disable()


def test_deepcache_wants_a_pruned_unet():
    from mosaicdiff.composition.deepcache import DeepCacheHelper

    with pytest.raises(ValueError, match="pipe.unet must be pruned, got NoneType"):
        DeepCacheHelper(tiny_pipeline(tiny_denoiser()))
