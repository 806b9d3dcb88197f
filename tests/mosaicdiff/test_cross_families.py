"""What is special to PixArt, the U-Nets, Wan, Sana and LTX."""

import pytest
import torch

from mosaicdiff.adapters import adapter_for
from mosaicdiff.adapters.ltx import KeptRotary

from . import cases_b
from .cutting import pack
from .test_families import uneven

pytestmark = pytest.mark.models


def check_inputs(denoiser, batch):
    latents, _, inputs = batch
    adapter_for(denoiser).check_inputs(denoiser, latents, inputs)


def test_pixart_alpha_is_told_the_size_of_the_picture():
    alpha = cases_b.tiny_pixart(use_additional_conditions=True)
    check_inputs(alpha, cases_b.pixart_alpha_batch())
    with pytest.raises(ValueError, match="and resolution and aspect_ratio"):
        check_inputs(alpha, cases_b.pixart_batch())
    with pytest.raises(ValueError, match="must be encoder_hidden_states and, where"):
        check_inputs(cases_b.tiny_pixart(), cases_b.pixart_alpha_batch())


def test_pixart_without_a_projection_of_captions():
    model = cases_b.tiny_pixart(caption_channels=None, cross_attention_dim=24)
    latents, _, inputs = cases_b.pixart_batch()
    with pytest.raises(ValueError, match=r"encoder_hidden_states must be \(2, text tokens, 24\)"):
        check_inputs(model, (latents, None, inputs))
    assert adapter_for(model).macs(model).linear > 0


def test_heads_of_a_unet_are_read_off_its_projections():
    layers = {x.name: x for x in adapter_for(cases_b.tiny_sdxl()).layers(cases_b.tiny_sdxl())}
    attention = layers["down_blocks.1.attentions.0.transformer_blocks.0.attn1"]
    assert (attention.groups, attention.width) == (4, 6)
    one = cases_b.tiny_unet()
    layers = {x.name: x for x in adapter_for(one).layers(one)}
    assert {(x.groups, x.width) for x in layers.values() if x.kind == "heads"} == {(3, 4), (3, 8)}


def test_tokens_of_a_unet_follow_its_levels():
    model = cases_b.tiny_sdxl()
    adapter = adapter_for(model)
    tokens = {name.split(".attentions")[0]: adapter.block_tokens(model, name)["image"]
              for name in adapter.blocks(model)}  # fmt: skip
    assert tokens == {"down_blocks.1": 16, "mid_block": 16, "up_blocks.0": 16}
    one = cases_b.tiny_unet()
    tokens = {name.split(".attentions")[0]: adapter.block_tokens(one, name)["image"]
              for name in adapter.blocks(one)}  # fmt: skip
    assert tokens == {"down_blocks.0": 64, "mid_block": 16, "up_blocks.1": 64}


def test_sdxl_needs_its_sizes():
    model = cases_b.tiny_sdxl()
    check_inputs(model, cases_b.sdxl_batch())
    with pytest.raises(ValueError, match="text_embeds and time_ids"):
        check_inputs(model, cases_b.unet_batch())
    latents, _, inputs = cases_b.sdxl_batch()
    inputs["time_ids"] = inputs["time_ids"][:, :5]
    with pytest.raises(ValueError, match=r"31 = text_embeds \+ 4 \* time_ids, got widths 7 and 5"):
        check_inputs(model, (latents, None, inputs))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"in_channels": 5}, "in_channels must be out_channels"),
        ({"sample_size": None}, "sample_size of a UNet2DConditionModel must be a number"),
        ({"only_cross_attention": True}, "only_cross_attention of a UNet2DConditionModel must be"),
        ({"dual_cross_attention": True}, "dual_cross_attention of a UNet2DConditionModel must be"),
        ({"num_class_embeds": 3}, "num_class_embeds of a UNet2DConditionModel must be None"),
        (
            {
                "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
                "mid_block_type": None,
            },
            "must have transformer blocks",
        ),
    ],
)  # fmt: skip
def test_unets_that_are_refused(options, message):
    model = cases_b.tiny_unet(**options)
    with pytest.raises(ValueError, match=message):
        adapter_for(model).check(model)


def test_wan_is_given_a_picture_beside_the_latents():
    """As the pipeline calls it: channels behind those of the latents."""
    model = cases_b.tiny_wan_picture()
    adapter = adapter_for(model)
    latents, timesteps, inputs = cases_b.wan_picture_batch()
    given = {
        "self": model,
        "hidden_states": torch.cat([latents, inputs["beside"]], 1),
        "timestep": timesteps,
        "encoder_hidden_states": inputs["encoder_hidden_states"],
        "encoder_hidden_states_image": inputs["encoder_hidden_states_image"],
    }
    found = adapter.conditions_of(given)
    assert found.keys() == inputs.keys()
    assert all(torch.equal(found[name], inputs[name]) for name in inputs)
    expected = model(**{k: v for k, v in given.items() if k != "self"}).sample
    assert torch.equal(adapter.predict(model, latents, timesteps, found), expected)
    check_inputs(model, (latents, None, inputs))
    with pytest.raises(ValueError, match=r"beside must be \(B, 3, 3, 4, 4\), the size of the lat"):
        check_inputs(model, (latents, None, inputs | {"beside": torch.zeros(2, 2, 3, 4, 4)}))
    short = inputs["encoder_hidden_states"][:, :7]
    with pytest.raises(ValueError, match="must be padded to 512 tokens"):
        check_inputs(model, (latents, None, inputs | {"encoder_hidden_states": short}))


def test_wan_with_a_time_for_every_token():
    """Wan 2.2 5B from text gives all tokens the same."""
    model = cases_b.tiny_wan()
    adapter = adapter_for(model)
    latents, timesteps, inputs = cases_b.wan_batch()
    many = timesteps[:, None].expand(2, 12)
    each = model(latents, many, inputs["encoder_hidden_states"]).sample
    torch.testing.assert_close(adapter.predict(model, latents, timesteps, inputs), each)
    packed = pack(model, uneven(model))
    one = packed(latents, timesteps, inputs["encoder_hidden_states"]).sample
    torch.testing.assert_close(packed(latents, many, inputs["encoder_hidden_states"]).sample, one)
    call = {"self": model, "hidden_states": latents, "timestep": many.clone(), **inputs}
    assert adapter.conditions_of(call).keys() == inputs.keys()
    call["timestep"][:, :4] = 0
    with pytest.raises(ValueError, match="timestep must be the same for all tokens"):
        adapter.conditions_of(call)


def test_wan_refused():
    model = cases_b.tiny_wan_picture(pos_embed_seq_len=6)
    with pytest.raises(ValueError, match="pos_embed_seq_len of a WanTransformer3DModel must be No"):
        adapter_for(model).check(model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_embeds": True}, "guidance_embeds of a SanaTransformer2DModel must be False"),
        ({"qk_norm": "rms_norm"}, "qk_norm of a SanaTransformer2DModel must be None or"),
    ],
)
def test_sana_refused(options, message):
    model = cases_b.tiny_sana(**options)
    with pytest.raises(ValueError, match=message):
        adapter_for(model).check(model)


def test_sana_is_given_scaled_times():
    model = cases_b.tiny_sana(timestep_scale=0.25)
    adapter, (latents, timesteps, inputs) = adapter_for(model), cases_b.sana_batch()
    expected = model(latents, timestep=timesteps * 0.25, **inputs).sample
    assert torch.equal(adapter.predict(model, latents, timesteps, inputs), expected)


def test_ltx_takes_its_sizes_as_numbers():
    model = cases_b.tiny_ltx()
    adapter, (latents, timesteps, inputs) = adapter_for(model), cases_b.ltx_batch()
    check_inputs(model, (latents, None, inputs))
    call = {
        "self": model, "hidden_states": latents, "timestep": timesteps, "num_frames": 2,
        "encoder_hidden_states": inputs["encoder_hidden_states"], "height": 3, "width": 4,
        "encoder_attention_mask": inputs["encoder_attention_mask"],
        "rope_interpolation_scale": (0.32, 32, 32),
    }  # fmt: skip
    found = adapter.conditions_of(call)
    assert all(torch.equal(found[name], inputs[name].to(found[name])) for name in inputs)
    expected = model(**{k: v for k, v in call.items() if k != "self"}).sample
    assert torch.equal(adapter.predict(model, latents, timesteps, found), expected)
    wrong = inputs | {"width": torch.tensor([5, 5])}
    with pytest.raises(ValueError, match="must be the tokens of the latents, 24, got"):
        check_inputs(model, (latents, None, wrong))


def test_the_rotary_embedding_of_ltx_is_cut_and_moves_along():
    model = cases_b.tiny_ltx()
    layer = adapter_for(model).layers(model)[0]
    packed = pack(model, {layer.name: [1, 3]})
    processor = packed.get_submodule(layer.name).processor
    assert isinstance(processor, KeptRotary)
    assert processor.columns.tolist() == [*range(8, 16), *range(24, 32)]
    assert not any("columns" in name for name in packed.state_dict())
    assert packed.to("meta").get_submodule(layer.name).processor.columns.is_meta
    assert not isinstance(model.get_submodule(layer.name).processor, KeptRotary)
