"""Save and load: bit-equal, plain diffusers, nothing twice, nothing half."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from safetensors.torch import load_file

import mosaicdiff
from mosaicdiff.checkpoint import CONFIG, storage_of
from mosaicdiff.files import whole_folder

from .conftest import linear_scheduler, sample, tiny_batches, tiny_denoiser

IN_A_NEW_PROCESS = """
import sys, numpy, torch
import mosaicdiff
from diffusers import DiTPipeline
pipe = DiTPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
images = pipe([1, 2, 3], num_inference_steps=8, guidance_scale=1.0,
              generator=torch.manual_seed(3), output_type="np").images
numpy.save(sys.argv[2], images)
"""


def prune(denoiser, **config):
    config = mosaicdiff.PruneConfig(**({"samples": 48, "steps": 20} | config))
    return mosaicdiff.prune(
        denoiser, config, scheduler=linear_scheduler(), calibration=tiny_batches()
    ).denoiser


def run_stages(staged):
    x, labels = torch.randn(2, 2, 8, 8, generator=torch.manual_seed(1)), torch.tensor([1, 2])
    dtype = staged.dtype
    return [staged(x.to(dtype), torch.tensor([t, t]), labels).sample for t in (950, 400, 30)]


def test_a_new_process_with_plain_diffusers_gives_the_same_bits(staged_pipe, tmp_path):
    import numpy as np

    staged_pipe.save_pretrained(tmp_path / "saved")
    files = sorted(path.name for path in (tmp_path / "saved" / "transformer").iterdir())
    assert files == [CONFIG, "diffusion_pytorch_model.safetensors", "report.json"]
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path / "saved"),
               str(tmp_path / "images.npy")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr
    # One thread or two may sum in another order: compare like with like.
    assert (np.load(tmp_path / "images.npy") == sample(staged_pipe)).all()


@pytest.mark.parametrize(
    "config",
    [
        {"sparsity": 0.4},
        {"sparsity": 0.4, "compensation": "affine"},
        {"sparsity": 0.4, "compensation": "none", "criterion": "magnitude"},
        {"allocation": "explicit", "stage_sparsity": (0.6, 0.0, 0.0)},
        {"allocation": "explicit", "stage_sparsity": (1.0, 0.2, 0.95)},
        {"allocation": "explicit", "stage_sparsity": (1.0, 1.0, 1.0)},
        {"sparsity": 0.0},
        {"stages": 1},
        {"boundaries": (100, 300, 500, 700)},
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()),
)
def test_round_trip_is_bit_equal(config, tmp_path):
    staged = prune(tiny_denoiser(), **config)
    staged.save_pretrained(tmp_path / "m")
    loaded = mosaicdiff.StagedDenoiser.from_pretrained(tmp_path / "m")
    for a, b in zip(run_stages(staged), run_stages(loaded), strict=True):
        assert torch.equal(a, b)
    loaded.save_pretrained(tmp_path / "again")
    first, second = (
        (tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("m", "again")
    )
    assert first == second


def count_bytes(denoiser, kept, compensated=True):
    """Bytes a checkpoint may take: shared once, writers as a union, readers for each stage."""
    size = {name: p.numel() * 4 for name, p in denoiser.named_parameters()}
    total = sum(size.values())
    from mosaicdiff.adapters import adapter_for

    for layer in adapter_for(denoiser).layers(denoiser):
        stages = [rows.get(layer.name, list(range(layer.groups))) for rows in kept]
        union = set().union(*(set(map(int, row)) for row in stages))
        for writer in layer.writers:
            whole = size[f"{writer.module}.weight"] + size.get(f"{writer.module}.bias", 0)
            total -= whole * (layer.groups - len(union)) // layer.groups
        reader = size[f"{layer.readers[0].name}.weight"]
        pruned = [len(row) for row in stages if len(row) < layer.groups]
        dense = 1 if len(pruned) < len(stages) else 0
        total += reader * (sum(pruned) + (dense - 1) * layer.groups) // layer.groups
    return total


@pytest.mark.parametrize("shares", [(0.6, 0.2, 0.4), (0.5, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_no_unpruned_tensor_is_stored_twice(shares):
    dense = tiny_denoiser()
    staged = prune(dense, allocation="explicit", stage_sparsity=shares)
    tensors = storage_of(staged)[0]
    stored = sum(t.numel() * 4 for name, t in tensors.items() if not name.startswith("kept."))
    assert stored == count_bytes(dense, staged.info.kept)


def test_stages_share_what_is_not_pruned_in_memory():
    staged = prune(tiny_denoiser(), allocation="explicit", stage_sparsity=(0.5, 0.0, 0.0))
    middle, late = staged.stage_models[1:]
    assert middle.transformer_blocks[0] is late.transformer_blocks[0] or (
        middle.transformer_blocks[0].ff is late.transformer_blocks[0].ff
    )
    dense = sum(p.numel() for p in tiny_denoiser().parameters())
    assert sum(p.numel() for p in staged.parameters()) < 2 * dense


def test_dtype_and_device_moves_keep_the_sharing(staged_pipe):
    staged = staged_pipe.transformer
    before = sum(p.numel() for p in staged.parameters())
    staged_pipe.to(torch.bfloat16)
    assert staged.dtype == torch.bfloat16
    assert sum(p.numel() for p in staged.parameters()) == before
    assert sample(staged_pipe).shape[0] == 3


def test_dtype_on_loading(staged_pipe, tmp_path):
    staged_pipe.save_pretrained(tmp_path / "m")
    loaded = DiTPipeline.from_pretrained(tmp_path / "m", torch_dtype=torch.float16)
    assert loaded.transformer.dtype == torch.float16
    assert {p.dtype for p in loaded.transformer.parameters()} == {torch.float16}


def test_from_pipe_follows_its_own_scheduler(staged_pipe):
    other = DiTPipeline.from_pipe(staged_pipe, scheduler=DDIMScheduler(beta_end=0.02))
    other.set_progress_bar_config(disable=True)
    assert other.transformer is staged_pipe.transformer
    assert any(s is other.scheduler for s in other.transformer._clock.schedulers)
    assert (sample(other) == sample(other)).all()


def test_variant_names_the_file(staged_pipe, tmp_path):
    staged_pipe.transformer.half()
    staged_pipe.save_pretrained(tmp_path / "m", variant="fp16")
    assert (tmp_path / "m/transformer/diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = DiTPipeline.from_pretrained(
        tmp_path / "m", variant="fp16", torch_dtype=torch.float16, vae=staged_pipe.vae
    )
    assert torch.equal(
        loaded.transformer.stage_models[0].proj_out_2.weight,
        staged_pipe.transformer.stage_models[0].proj_out_2.weight,
    )


def test_pickle_is_refused(staged_pipe, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        staged_pipe.transformer.save_pretrained(tmp_path / "m", safe_serialization=False)
    assert not (tmp_path / "m").exists()


def test_another_version_is_refused(staged_pipe, tmp_path):
    staged_pipe.transformer.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / CONFIG).read_text())
    (tmp_path / "m" / CONFIG).write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version must be 3, got 99"):
        mosaicdiff.StagedDenoiser.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / CONFIG).unlink(), "must hold config.json"),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "must hold diffusion"),
        (lambda f: (f / CONFIG).write_text('{"_class_name": "Other"}'), "got Other"),
    ],
)
def test_a_broken_folder_is_named(staged_pipe, tmp_path, spoil, message):
    staged_pipe.transformer.save_pretrained(tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        mosaicdiff.StagedDenoiser.from_pretrained(tmp_path / "m")


def test_missing_weights_are_named(staged_pipe, tmp_path):
    from safetensors.torch import save_file

    staged_pipe.transformer.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("shared.proj_out_2.weight")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"weights must hold .*proj_out_2\.weight"):
        mosaicdiff.StagedDenoiser.from_pretrained(tmp_path / "m")


def test_a_stage_trained_alone_is_stored_apart_not_lost(tmp_path):
    staged = prune(tiny_denoiser(), sparsity=0.4)
    writer = staged.stage_models[0].transformer_blocks[0].ff.net[0].proj
    writer.weight.data += 1
    staged.save_pretrained(tmp_path / "m")
    loaded = mosaicdiff.StagedDenoiser.from_pretrained(tmp_path / "m")
    for a, b in zip(run_stages(staged), run_stages(loaded), strict=True):
        assert torch.equal(a, b)


def test_stages_that_no_longer_share_are_refused(tmp_path):
    staged = prune(tiny_denoiser(), sparsity=0.4)
    staged.stage_models[0].proj_out_2 = copy.deepcopy(staged.stage_models[0].proj_out_2)
    with pytest.raises(ValueError, match=r"proj_out_2\.\w+ must be shared by all stages"):
        staged.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overwrite_keeps_the_old(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out", overwrite=True):
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    with whole_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("y")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
