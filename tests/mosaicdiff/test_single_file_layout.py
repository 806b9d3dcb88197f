"""What the tensors of published files are made of, found by converting row numbers."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils

from mosaicdiff.single_file.layout import Run, conversion_of, derive_layout

from .cases_b import tiny_wan, tiny_wan_picture
from .conftest import tiny_sd3
from .single_files import (
    flux_tensors,
    ltx_tensors,
    sana_tensors,
    sd3_tensors,
    unet_tensors,
    wan_tensors,
    with_width,
)
from .tiny_pipelines import tiny_ltx, tiny_sana


def tiny_flux() -> FluxTransformer2DModel:
    torch.manual_seed(5)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).requires_grad_(False)


def tiny_unet(linear: bool) -> UNet2DConditionModel:
    """With linear projections as SDXL, or with convolutions as SD1.5."""
    torch.manual_seed(5)
    extra = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 34, "transformer_layers_per_block": (1, 2),
    }  # fmt: skip
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 4),
        cross_attention_dim=10,
        norm_num_groups=4,
        use_linear_projection=linear,
        **(extra if linear else {}),
    ).requires_grad_(False)


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def others():
    return {"first_stage_model.decoder.weight": torch.ones(3, 4), "scale": torch.tensor(2.0)}


CASES = {
    "sd3": lambda: (tiny_sd3(dual=(), qk_norm=None), sd3_tensors),
    "sd3.5": lambda: (tiny_sd3(), sd3_tensors),
    "flux": lambda: (tiny_flux(), flux_tensors),
    "sdxl": lambda: (tiny_unet(True), lambda state: unet_tensors(state, layers=1)),
    "sd1.5": lambda: (tiny_unet(False), lambda state: unet_tensors(state, layers=1)),
    "wan": lambda: (tiny_wan(), wan_tensors),
    "wan-i2v": lambda: (tiny_wan_picture(), wan_tensors),
    "ltx": lambda: (tiny_ltx(), ltx_tensors),
    "sana": lambda: (tiny_sana(), sana_tensors),
    "diffusers": lambda: (tiny_sd3(), dict),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_rebuilt_from_the_converted_model(case):
    """The file was written by hand: every row of it must be found where it came from."""
    model, write = CASES[case]()
    state = model.state_dict()
    file = write(state) | (others() if case != "diffusers" else {})
    convert = conversion_of(type(model).__name__)
    if case == "flux":
        convert = with_width(convert, 32)
    layout = derive_layout(convert, dict(model.config), shapes(state), shapes(file))
    unused = {"pos_embed", "y_embedder.y_embedding"} if case == "sana" else set()
    assert set(file) - set(layout) == unused | (set(others()) if case != "diffusers" else set())
    for name, runs in layout.items():
        rebuilt = [state[run.parameter][run.start : run.start + run.rows] for run in runs]
        assert torch.equal(torch.cat(rebuilt) if file[name].ndim else rebuilt[0], file[name])


def test_fused_rows_and_swapped_halves_are_told():
    model = tiny_sd3()
    state = model.state_dict()
    file = sd3_tensors(state, prefix="")
    convert = conversion_of("SD3Transformer2DModel")
    layout = derive_layout(convert, dict(model.config), shapes(state), shapes(file))
    assert layout["joint_blocks.1.context_block.attn.qkv.weight"] == tuple(
        Run(f"transformer_blocks.1.attn.add_{letter}_proj.weight", 0, 32) for letter in "qkv"
    )
    assert layout["final_layer.adaLN_modulation.1.bias"] == (
        Run("norm_out.linear.bias", 32, 32),
        Run("norm_out.linear.bias", 0, 32),
    )


def test_the_rows_of_flux_at_its_own_size():
    """Two numbers a row: 12 billion parameters are found in little memory and time."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = FluxTransformer2DModel(guidance_embeds=True)
    state = model.state_dict()
    file = flux_tensors(state)
    layout = derive_layout(
        conversion_of("FluxTransformer2DModel"), dict(model.config), shapes(state), shapes(file)
    )
    assert set(layout) == set(file)
    single = "single_transformer_blocks.37"
    assert layout["single_blocks.37.linear1.weight"] == (
        *(Run(f"{single}.attn.to_{letter}.weight", 0, 3072) for letter in "qkv"),
        Run(f"{single}.proj_mlp.weight", 0, 4 * 3072),
    )


def test_a_file_of_another_model_is_refused():
    model = tiny_sd3()
    state, convert = model.state_dict(), conversion_of("SD3Transformer2DModel")
    file = sd3_tensors(state)
    del file["model.diffusion_model.x_embedder.proj.bias"]
    with pytest.raises(ValueError, match="diffusers cannot convert it: KeyError.*x_embedder"):
        derive_layout(convert, dict(model.config), shapes(state), shapes(file))
    file = sd3_tensors(tiny_sd3(layers=4).state_dict())
    with pytest.raises(ValueError, match="source must be the file|must hold|are in no parameter"):
        derive_layout(convert, dict(model.config), shapes(state), shapes(file))
    file = sd3_tensors(state)
    file["model.diffusion_model.context_embedder.weight"] = torch.zeros(32, 7)
    with pytest.raises(ValueError, match=r"context_embedder\.weight of \(32, 12\) is \(32, 7\)"):
        derive_layout(convert, dict(model.config), shapes(state), shapes(file))


PARAMETERS = {"a": (4, 6), "b": (4, 6)}
FILE = {"one": (8, 6), "rest": (3,)}


def halves(checkpoint):
    return checkpoint["one"].chunk(2)


def made_by(change):
    """A conversion into a and b, each the change of one half."""

    def convert(checkpoint, **_):
        first, second = halves(checkpoint)
        return {"a": change(first), "b": change(second)}

    return convert


@pytest.mark.parametrize(
    "convert, message",
    [
        (lambda checkpoint, **_: {"a": halves(checkpoint)[0]}, "source must hold b"),
        (
            lambda checkpoint, **_: {"a": halves(checkpoint)[0], "b": halves(checkpoint)[0]},
            "a and b are made of the same|b and a are made of the same",
        ),
        (
            made_by(lambda x: x.flip(1)),
            "must only move rows, but a",
        ),
        (
            made_by(lambda x: x * 2),
            "must only move rows, but a",
        ),
        (
            made_by(lambda x: x + 1.5),
            "must only move rows, but a",
        ),
        (
            made_by(lambda x: x.T),
            "must only move rows, but a",
        ),
        (
            made_by(lambda x: x[:3]),
            r"a of \(4, 6\) is \(3,\) there",
        ),
        (
            lambda checkpoint, **_: {"a": halves(checkpoint)[0], "b": checkpoint["rest"]},
            "must only move rows, but b",
        ),
    ],
)
def test_conversions_that_do_more_than_move_rows_are_refused(convert, message):
    with pytest.raises(ValueError, match=message):
        derive_layout(convert, {}, PARAMETERS, FILE)


def test_a_tensor_used_in_part_is_refused():
    with pytest.raises(ValueError, match="one must be used whole, but 4 of its rows"):
        derive_layout(lambda checkpoint, **_: {"a": halves(checkpoint)[0]}, {}, {"a": (4, 6)}, FILE)


def test_classes_without_single_files_are_refused():
    with pytest.raises(ValueError, match="reads from single files, got DiTTransformer2DModel"):
        conversion_of("DiTTransformer2DModel")


def test_diffusers_reads_the_hand_written_files_as_the_model():
    """The fixtures themselves: what diffusers makes of them is the model they were written from."""
    for model, file, config in (
        (tiny_sd3(), sd3_tensors, SD3Transformer2DModel),
        (tiny_unet(True), lambda s: unet_tensors(s, layers=1), UNet2DConditionModel),
    ):
        convert = conversion_of(config.__name__)
        found = convert(checkpoint=file(model.state_dict()), config=dict(model.config))
        assert found.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(found[name], tensor)
    assert single_file_utils.convert_flux_transformer_checkpoint_to_diffusers is conversion_of(
        "FluxTransformer2DModel"
    )
