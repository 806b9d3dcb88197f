"""States of a model that are refused, and those that are not."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from diffusers.models import attention_processor as attention
from diffusers.models.attention_processor import Attention
from torch import nn

from mosaicdiff.model_checks import check_shapes, check_state

from .conftest import tiny_denoiser, tiny_sd3

PLAIN = ("AttnProcessor", "AttnProcessor2_0", "JointAttnProcessor2_0", "FluxAttnProcessor")


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        cross_attention_dim=12,
        norm_num_groups=4,
    )


def tiny_flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


MODELS = {"dit": tiny_denoiser, "sd3": tiny_sd3, "unet": tiny_unet, "flux": tiny_flux}


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_model_passes(name):
    check_state(MODELS[name](), PLAIN)


def train(model):
    model.train().requires_grad_(True)


def checkpoint(model):
    model.enable_gradient_checkpointing()


def offload(model):
    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, offload_type="leaf_level")


def half(model):
    model.bfloat16()


def backend(model):
    model.set_attention_backend("_native_math")


@pytest.mark.parametrize("change", [train, checkpoint, offload, half, backend])
@pytest.mark.parametrize("name", ["sd3", "unet", "flux"])
def test_states_that_change_no_weight_pass(name, change):
    model = MODELS[name]()
    change(model)
    check_state(model, PLAIN)


def adapter_config(model):
    model.peft_config, model._hf_peft_config_loaded = {"style": {"r": 4}}, True


def adapter_layer(model):
    model.transformer_blocks[0].ff.net[2].lora_A = nn.ModuleDict()


def quantised_config(model):
    model.register_to_config(quantization_config={"quant_method": "bitsandbytes"})


class PackedTensor(torch.Tensor):
    """As torchao, quanto and GGUF hold weights: a tensor of another kind."""


def packed(model):
    layer = model.transformer_blocks[0].ff.net[2]
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(PackedTensor))


def eight_bit(model):
    model.transformer_blocks[0].ff.net[2].to(torch.float8_e4m3fn)


def whole_numbers(model):
    layer = model.transformer_blocks[0].ff.net[2]
    layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)


def casting(model):
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def compiled(model):
    model.compile(backend="eager")


def compiled_block(model):
    model.transformer_blocks[1].compile(backend="eager")


def fused(model):
    model.fuse_qkv_projections()


def divided(model):
    from diffusers import ContextParallelConfig, ParallelConfig

    settings = ContextParallelConfig(ring_degree=2)
    model._parallel_config = ParallelConfig(context_parallel_config=settings)


def another_processor(model):
    class Mine(attention.JointAttnProcessor2_0):
        pass

    model.set_attn_processor(Mine())


@pytest.mark.parametrize(
    "spoil, message",
    [
        (adapter_config, r"\(LoRA\) is loaded: style.*fuse_lora\(\) and then unload_lora_weights"),
        (adapter_layer, r"ff\.net\.2 must be a plain layer, but an adapter \(LoRA\) is loaded"),
        (quantised_config, "must not be quantised.*quantization_config is set.*16 or 32 bits"),
        (packed, r"ff\.net\.2\.weight must be a plain tensor.*PackedTensor.*16 or 32 bits"),
        (eight_bit, r"ff\.net\.2\.weight must be of 16 or 32 bits.*float8_e4m3fn.*quantise what"),
        (whole_numbers, r"ff\.net\.2\.weight must be of 16 or 32 bits.*int8"),
        (casting, r"layerwise casting has rounded them.*enable_layerwise_casting\(\) afterwards"),
        (compiled, "must not be compiled.*compile the stages afterwards"),
        (compiled_block, "must not be compiled"),
        (fused, "must have its own q, k and v.*Load the model again, prune, and fuse afterwards"),
        (divided, r"context or tensor parallel\).*torchrun"),
        (another_processor, "must be AttnProcessor or .*another: Mine.*prune before you set"),
    ],
)
def test_states_that_cannot_be_pruned_are_refused(spoil, message):
    model = tiny_sd3()
    spoil(model)
    with pytest.raises(ValueError, match=f"(?s)^prune: .*{message}"):
        check_state(model, PLAIN)


def test_a_wrapped_model_is_refused():
    with pytest.raises(ValueError, match="must not be compiled"):
        check_state(torch.compile(tiny_sd3(), backend="eager"))


def test_a_pruned_model_is_refused(staged_pipe):
    with pytest.raises(ValueError, match="pruned already. Prune the original"):
        check_state(staged_pipe.transformer)


def slice_attention(model):
    model.set_attention_slice("max")


def xformers(model):
    model.set_attn_processor(attention.XFormersAttnProcessor())


def perturb(model):
    names = [n for n in model.attn_processors if "attn1" in n]
    plain = dict(model.attn_processors)
    model.set_attn_processor(
        plain | {n: attention.PAGIdentitySelfAttnProcessor2_0() for n in names}
    )


def ip_adapter(model):
    found = {
        name: attention.IPAdapterAttnProcessor2_0(16, 12) if "attn2" in name else processor
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(found)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (slice_attention, "attention is sliced: SlicedAttnProcessor. Call disable_attention_slic"),
        (xformers, r"xFormers.*Call disable_xformers_memory_efficient_attention\(\)"),
        (perturb, "perturbed attention guidance.*PAGIdentity"),
        (ip_adapter, r"attn2 must be .*IP-Adapter is loaded.*unload_ip_adapter\(\)"),
    ],
)
def test_processors_of_other_purposes_are_refused_by_name(spoil, message):
    model = tiny_unet()
    spoil(model)
    with pytest.raises(ValueError, match=message):
        check_state(model, PLAIN)


def test_what_undoes_slicing_undoes_it():
    model = tiny_unet()
    model.set_attention_slice("max")
    model.set_attention_slice(None)
    check_state(model, PLAIN)


def test_a_cache_is_refused_until_it_is_disabled():
    model = tiny_flux()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"must run in every call, but 'fbc_.*disable_cache\(\)"):
        check_state(model, PLAIN)
    model.disable_cache()
    check_state(model, PLAIN)


def test_grouped_key_heads_are_refused_but_where_they_are_handled():
    model = tiny_denoiser()
    model.transformer_blocks[0].attn1 = Attention(32, heads=4, dim_head=8, kv_heads=2)
    with pytest.raises(ValueError, match="attn1 must have as many key and value heads.*16 and 32"):
        check_state(model, PLAIN)
    check_state(model, PLAIN, grouped_kv=True)


def test_shapes_are_held_to_the_configuration():
    dense = tiny_denoiser().state_dict()
    check_shapes(tiny_denoiser(), dense)
    model = tiny_denoiser()
    model.transformer_blocks[0].ff.net[2] = nn.Linear(96, 32)
    with pytest.raises(ValueError, match=r"\(32, 128\).*\(32, 96\). Was it pruned by other means"):
        check_shapes(model, dense)
    model = tiny_denoiser()
    model.transformer_blocks[0].ff = nn.Identity()
    with pytest.raises(ValueError, match="must hold transformer_blocks.0.ff"):
        check_shapes(model, dense)
    model = tiny_denoiser()
    model.added = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"it holds added\.weight besides"):
        check_shapes(model, dense)
