"""Pruned models in the layout that they were published in."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

import mosaicdiff
from mosaicdiff import load_single_file, save_single_file
from mosaicdiff.single_file.plan import KEY, read_header

from .conftest import flow_scheduler, tiny_sd3, tiny_sd3_batches
from .single_files import sd3_tensors, write_single_file

PREFIX = "model.diffusion_model."


def prune(model, **config):
    config = {"sparsity": 0.4, "samples": 48, "steps": 20} | config
    return mosaicdiff.prune(
        model,
        mosaicdiff.PruneConfig(**config),
        scheduler=flow_scheduler(),
        calibration=tiny_sd3_batches(),
    ).denoiser


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    place = tmp_path_factory.mktemp("single")
    return write_single_file(place / "sd3.safetensors", sd3_tensors(tiny_sd3().state_dict()))


@pytest.fixture(scope="module", params=[1, 3])
def staged(request):
    return prune(tiny_sd3(), stages=request.param)


def call(model, timestep: float = 700.0):
    latents, inputs = tiny_sd3_batches(4)[0]
    condition = {name: value for name, value in inputs.items() if "negative" not in name}
    return model(latents, timestep=torch.full((4,), timestep), **condition).sample


def same_weights(first, second) -> bool:
    states = [[m.state_dict() for m in one.stage_models] for one in (first, second)]
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(*states, strict=True)
    )


def test_saved_and_loaded_is_the_same(source, staged, tmp_path):
    path = tmp_path / "pruned.safetensors"
    save_single_file(staged, path, source=source)
    back = load_single_file(path)
    assert same_weights(staged, back)
    for timestep in (950.0, 600.0, 30.0):
        assert torch.equal(call(staged, timestep), call(back, timestep))
    assert back.info.prune_config == json.loads(json.dumps(staged.info.prune_config))
    assert back.info.report == staged.info.report
    assert back.info.steps == staged.info.steps
    for ours, theirs in zip(staged.info.kept, back.info.kept, strict=True):
        assert {k: v.tolist() for k, v in ours.items()} == {
            k: v.tolist() for k, v in theirs.items()
        }


def test_the_rest_of_the_file_is_untouched(source, staged, tmp_path):
    path = tmp_path / "pruned.safetensors"
    save_single_file(staged, path, source=source)
    before, after = load_file(source), load_file(path)
    for name in ("other.weight", "other.position_ids", f"{PREFIX}pos_embed"):
        assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name])
    assert read_header(path)[1]["modelspec.title"] == "tiny"


def test_one_network_is_the_published_layout_with_smaller_shapes(source, tmp_path):
    staged = prune(tiny_sd3(), stages=1, sparsity=0.3, least_heads=1, least_neurons=4)
    path = tmp_path / "pruned.safetensors"
    save_single_file(staged, path, source=source)
    before, after = load_file(source), load_file(path)
    assert after.keys() == before.keys()
    (stage,) = staged.stage_models
    block = stage.transformer_blocks[1]
    fused = after[f"{PREFIX}joint_blocks.1.x_block.attn.qkv.weight"]
    assert len(fused) < len(before[f"{PREFIX}joint_blocks.1.x_block.attn.qkv.weight"])
    assert torch.equal(fused, torch.cat([getattr(block.attn, f"to_{n}").weight for n in "qkv"]))
    assert path.stat().st_size < source.stat().st_size


def test_stages_repeat_only_what_differs(source, tmp_path):
    staged, path = prune(tiny_sd3(), stages=3), tmp_path / "pruned.safetensors"
    save_single_file(staged, path, source=source)
    staged.save_pretrained(tmp_path / "folder")
    held, before = load_file(path), load_file(source)
    own = [name for name in held if name.startswith("mosaicdiff.")]
    assert own and all(name.split(".")[1] == "stage" for name in own)
    assert all(name.split(".", 3)[3] in before for name in own)
    folder = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    theirs = sum(t.nbytes for name, t in folder.items() if not name.startswith("kept."))
    extra = sum(before[name].nbytes for name in ("other.weight", "other.position_ids"))
    assert sum(t.nbytes for t in held.values()) - extra == theirs


def whole(model, count: int):
    """Stages that lose nothing."""
    staged = prune(model, stages=count)
    staged.info.kept = [{} for _ in range(count)]
    return type(staged).assemble(model, staged.info, [{} for _ in range(count)])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dense_model_gives_the_file_back_byte_for_byte(tmp_path, count, dtype):
    tensors = {k: v.to(dtype) for k, v in sd3_tensors(tiny_sd3().state_dict()).items()}
    source = write_single_file(tmp_path / "dense.safetensors", tensors)
    tiny_sd3().save_config(tmp_path / "config")
    model = SD3Transformer2DModel.from_single_file(str(source), config=str(tmp_path / "config"))
    save_single_file(whole(model.requires_grad_(False), count), tmp_path / "again.safetensors",
                     source=source)  # fmt: skip
    before, after = load_file(source), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)


def test_what_did_not_change_keeps_its_bits_though_loaded_in_fewer(source, tmp_path):
    staged = prune(tiny_sd3(), stages=3).bfloat16()
    save_single_file(staged, tmp_path / "pruned.safetensors", source=source)
    before, after = load_file(source), load_file(tmp_path / "pruned.safetensors")
    name = f"{PREFIX}context_embedder.weight"
    assert torch.equal(after[name], before[name])
    assert same_weights(staged, load_single_file(tmp_path / "pruned.safetensors").bfloat16())


def test_a_layer_without_groups_and_layers_trained_in_one_stage_come_back(source, tmp_path):
    staged = prune(
        tiny_sd3(), stages=2, least_heads=0, least_neurons=0, sparsity=None,
        allocation="explicit", stage_sparsity=(0.3, 0.9),
        layer_sparsity={"transformer_blocks.1.attn": 1.0, "transformer_blocks.1.ff": 1.0},
    )  # fmt: skip
    stage = staged.stage_models[1]
    for linear in (stage.transformer_blocks[0].attn.to_k, stage.transformer_blocks[2].ff.net[2]):
        linear.weight.data = linear.weight.data.clone().mul_(1.5)
    path = tmp_path / "pruned.safetensors"
    save_single_file(staged, path, source=source)
    assert same_weights(staged, load_single_file(path))


def test_masked_weights_come_back(source, tmp_path):
    staged = prune(tiny_sd3(), stages=2, granularity="unstructured", sparsity=0.5)
    path = tmp_path / "pruned.safetensors"
    save_single_file(staged, path, source=source)
    assert same_weights(staged, load_single_file(path))


def refuse(staged, path, source, message, **options):
    with pytest.raises(ValueError, match=message):
        save_single_file(staged, path, source=source, **options)
    return path


def test_what_cannot_be_written_is_refused(source, tmp_path):
    staged, path = prune(tiny_sd3(), stages=1), tmp_path / "pruned.safetensors"
    refuse(staged, tmp_path / "pruned.bin", source, "path must end in .safetensors")
    refuse(staged, path, tmp_path / "none.safetensors", "which does not exist")
    refuse(staged, path, tmp_path / "model.ckpt", "Convert pickled checkpoints")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    refuse(staged, path, broken, "could not be read")
    save_single_file(staged, path, source=source)
    refuse(staged, path, source, "path must be new.*overwrite=True")
    refuse(staged, tmp_path / "second.safetensors", path, "source must be dense.*pruned already")
    save_single_file(staged, path, source=source, overwrite=True)
    assert same_weights(staged, load_single_file(path))
    (tmp_path / "folder.safetensors").mkdir()
    refuse(staged, tmp_path / "folder.safetensors", source, "must be a file.*is a folder")
    other = sd3_tensors(tiny_sd3(dual=()).state_dict())
    save_file(other, tmp_path / "other.safetensors")
    refuse(staged, tmp_path / "second.safetensors", tmp_path / "other.safetensors", "source must")
    eight = {k: v.to(torch.float8_e4m3fn) for k, v in sd3_tensors(tiny_sd3().state_dict()).items()}
    save_file(eight, tmp_path / "eight.safetensors")
    refuse(staged, tmp_path / "second.safetensors", tmp_path / "eight.safetensors",
           "must hold F64.*F8_E4M3 in.*Prune before quantising")  # fmt: skip
    assert not list(tmp_path.glob("*.partial"))
    assert not (tmp_path / "second.safetensors").exists()


def test_what_cannot_be_read_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="must have been written by save_single_file"):
        load_single_file(source)
    path = tmp_path / "pruned.safetensors"
    save_single_file(prune(tiny_sd3(), stages=1), path, source=source)
    held, metadata = load_file(path), read_header(path)[1]
    plan = json.loads(metadata[KEY])

    def spoil(tensors, **changes):
        save_file(tensors, path, metadata={KEY: json.dumps(plan | changes)})

    spoil(held, version=9)
    with pytest.raises(ValueError, match="version must be 1, got 9"):
        load_single_file(path)
    name = f"{PREFIX}joint_blocks.1.x_block.attn.qkv.weight"
    spoil({k: v for k, v in held.items() if k != name})
    with pytest.raises(ValueError, match="must hold .*qkv.weight, but it does not"):
        load_single_file(path)
    spoil(held | {name: held[name][1:].contiguous()})
    with pytest.raises(ValueError, match=r"qkv.weight must have \d+ rows"):
        load_single_file(path)
