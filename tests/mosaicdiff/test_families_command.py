"""What `mosaicdiff families` says of all families, and of one model."""

import json
import shutil

import diffusers
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

import mosaicdiff
from mosaicdiff import check_prunable
from mosaicdiff.adapters import DENOISER_CLASSES
from mosaicdiff.families import empty_model, families, view_model

from .commands import refused, run, run_json
from .conftest import linear_scheduler, tiny_denoiser, tiny_sd3
from .family_cases import CASES
from .single_files import sd3_tensors, write_single_file

pytestmark = pytest.mark.models


def test_every_family_says_what_goes_and_what_stays():
    rows = run_json("families")["families"]
    assert [row["denoiser"] for row in rows] == list(DENOISER_CLASSES)
    for row in rows:
        assert row["goes"] and row["norms"] and row["stays"]
        assert all(hasattr(diffusers, name) for name in row["pipelines"]) and row["pipelines"]
    text = run("families").output
    assert all(name in text for name in DENOISER_CLASSES)
    assert "unless" in text and "--prune-ends" in text


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_goes_or_stays_for_a_reason(name):
    model = CASES[name].make()
    view = view_model(model)
    assert view.obstacle is None and view.goes
    assert view.parameters == sum(p.numel() for p in model.parameters())
    goes = sum(row.parameters for row in view.goes)
    assert goes + sum(part.parameters for part in view.stays) == view.parameters
    assert not [part.name for part in view.stays if part.why.startswith("in no layer")]
    assert 0 < sum(row.macs_share for row in view.goes) <= 1


def test_the_embedded_model_in_numbers():
    view = run_json("families", "digits")
    attention, ff = view["goes"]
    assert attention["name"] == "transformer_blocks.*.attn1" and attention["kind"] == "heads"
    assert (attention["layers"], attention["groups"], attention["removable"]) == (6, [6, 6], 36)
    tokens, width = 16, 192
    assert attention["macs"] == 6 * (4 * tokens * width**2 + 2 * tokens**2 * width)
    assert attention["parameters"] == 6 * (4 * width**2 + 3 * width)
    assert ff["macs"] == 6 * 2 * tokens * width * 4 * width
    text = run("families", "digits").output
    assert "what could go" in text and "768 neurons" in text and "residual stream" in text


def test_a_folder_is_read_without_its_weights(tmp_path, tiny_sd3_folder):
    shutil.copytree(tiny_sd3_folder, tmp_path / "bare")
    for weights in (tmp_path / "bare").rglob("*.safetensors"):
        weights.unlink()
    view = run_json("families", tmp_path / "bare")
    assert view["denoiser"] == "SD3Transformer2DModel" and view["obstacle"] is None
    assert view["whole_ends"] == ["transformer_blocks.0", "transformer_blocks.3"]
    assert view["goes"] == run_json("families", tmp_path / "bare" / "transformer")["goes"]
    assert "transformer_blocks.3 stay whole too" in run("families", tmp_path / "bare").output
    assert all(p.is_meta for p in empty_model(tmp_path / "bare").parameters())


def test_a_single_file_is_read_with_its_pipeline(tmp_path, tiny_sd3_folder):
    pipe = mosaicdiff.load_pipeline(tiny_sd3_folder)
    file = write_single_file(tmp_path / "a.safetensors", sd3_tensors(pipe.transformer.state_dict()))
    view = run_json("families", file, "--pipeline-config", tiny_sd3_folder)
    assert view["goes"] == run_json("families", tiny_sd3_folder)["goes"]
    refused("must come with the folder or Hub id", "families", file)
    refused("left out but for a single file", "families", tiny_sd3_folder,
            "--pipeline-config", tiny_sd3_folder)  # fmt: skip
    other = write_single_file(tmp_path / "b.safetensors", sd3_tensors(tiny_sd3().state_dict()))
    refused("single file: source must", "families", other, "--pipeline-config", tiny_sd3_folder)


def test_an_unsupported_model_says_what_is_needed(tmp_path):
    model = CogVideoXTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, time_embed_dim=8,
        text_embed_dim=8, in_channels=4, out_channels=4, sample_width=4, sample_height=4,
    )  # fmt: skip
    model.save_config(tmp_path / "video")
    view = run_json("families", tmp_path / "video")
    assert view["found"] == {"Attention": 2, "FeedForward": 2} and not view["goes"]
    text = run("families", tmp_path / "video").output
    assert "cannot be pruned" in text and "one declaration in mosaicdiff/adapters" in text
    with pytest.raises(ValueError, match="must be one of DiT.*got CogVideoXTransformer3DModel"):
        check_prunable(model)


def test_a_state_that_must_change_first_is_told_and_not_raised():
    model = tiny_sd3()
    check_prunable(model)
    model.fuse_qkv_projections()
    view = view_model(model)
    assert "they are fused. Load the model again" in view.obstacle and not view.goes
    with pytest.raises(ValueError, match="they are fused"):
        check_prunable(model)


def test_compiled_and_quantised_models_are_refused_by_prune_itself():
    for model, message in (
        (torch.compile(tiny_denoiser(), backend="eager"), "must not be compiled"),
        (tiny_denoiser().to(torch.float8_e4m3fn), "must be of 16 or 32 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            mosaicdiff.prune(model, scheduler=linear_scheduler(), calibration=[])


def test_models_that_are_none_are_refused(tmp_path, staged_pipe, tiny):
    staged_pipe.save_pretrained(tmp_path / "pruned")
    refused("must be dense, but it is pruned already", "families", tmp_path / "pruned")
    refused("must be 'digits', a local folder, a single file", "families", tmp_path / "nothing")
    refused("in diffusers' layout", "families", tiny.folder.parent)
    refused("must be left out without MODEL", "families", "--pipeline-config", tiny.folder)
    shutil.copytree(tiny.folder / "transformer", tmp_path / "quantised")
    place = tmp_path / "quantised" / "config.json"
    settings = json.loads(place.read_text()) | {"quantization_config": {"quant_method": "gguf"}}
    place.write_text(json.dumps(settings))
    refused("must not be quantised", "families", tmp_path / "quantised")
    place.write_text(json.dumps({"_class_name": "NoModel"}))
    refused("must be of a diffusers model, got 'NoModel'", "families", tmp_path / "quantised")
    index = tiny.folder / "model_index.json"
    (tmp_path / "other").mkdir()
    values = {k: v for k, v in json.loads(index.read_text()).items() if k != "transformer"}
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(values))
    refused("with one of transformer, unet, got DiTPipeline", "families", tmp_path / "other")


def test_a_pruned_single_file_is_refused(tmp_path):
    from .test_single_file import prune

    source = write_single_file(tmp_path / "a.safetensors", sd3_tensors(tiny_sd3().state_dict()))
    path = tmp_path / "pruned.safetensors"
    mosaicdiff.save_single_file(prune(tiny_sd3(), stages=1), path, source=source)
    refused("pruned already. Look with mosaicdiff info", "families", path)


def test_families_are_said_in_the_order_of_the_registry():
    assert [row.denoiser for row in families()] == list(DENOISER_CLASSES)
