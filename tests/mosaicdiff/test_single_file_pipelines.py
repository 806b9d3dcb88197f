"""Whole pipelines from single files, dense and pruned, and the command line on them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mosaicdiff
from mosaicdiff import StagedDenoiser, load_single_file, load_single_file_pipeline

from .commands import refused, run, run_json
from .single_files import (
    sd3_tensors,
    unet_tensors,
    vae_tensors,
    wan_tensors,
    write_single_file,
)
from .tiny_pipelines import PIPELINES

pytestmark = pytest.mark.models

SHORT = ("--pipeline-option", "max_sequence_length=8")
FAST = ("--activations", "trajectory", "--steps", 4, "--trajectories", 4, "--trajectory-batch", 2,
        *SHORT)  # fmt: skip


def picture(pipe, prompt="a cat"):
    return pipe(
        prompt, num_inference_steps=4, generator=torch.manual_seed(5), output_type="np",
        max_sequence_length=8,
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def place(tiny_sd3_folder, tmp_path_factory):
    """A single file of transformer and VAE, one of the transformer alone, and a folder without
    their weights."""
    place = tmp_path_factory.mktemp("single-files")
    pipe = mosaicdiff.load_pipeline(tiny_sd3_folder)
    transformer = sd3_tensors(pipe.transformer.state_dict())
    vae = vae_tensors(pipe.vae.state_dict())
    write_single_file(place / "whole.safetensors", transformer | vae)
    write_single_file(place / "alone.safetensors", transformer, others=False)
    shutil.copytree(tiny_sd3_folder, place / "config")
    for name in ("transformer", "vae"):
        (place / "config" / name / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copytree(tiny_sd3_folder, place / "encoders")
    (place / "encoders" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (place / "prompts.txt").write_text("a cat\na dog\nb cat 7\n")
    return place


@pytest.mark.parametrize(
    "file, config", [("whole", "config"), ("whole", "encoders"), ("alone", "encoders")]
)
def test_a_dense_file_is_the_pipeline_it_was_written_from(tiny_sd3_folder, place, file, config):
    file = place / f"{file}.safetensors"
    pipe = mosaicdiff.load_pipeline(file, config=place / config)
    assert (picture(pipe) == picture(mosaicdiff.load_pipeline(tiny_sd3_folder))).all()
    assert mosaicdiff.sources.source_name(pipe) == str(file)


def test_components_may_be_given(tiny_sd3_folder, place):
    scheduler = mosaicdiff.load_pipeline(tiny_sd3_folder).scheduler
    made = load_single_file_pipeline(
        place / "whole.safetensors", place / "config", scheduler=scheduler, text_encoder_3=None
    )
    assert made.scheduler is scheduler and made.text_encoder_3 is None


@pytest.fixture(scope="module", params=["whole", "alone"])
def pruned(place, request, tmp_path_factory):
    """A file pruned by the command line, and what the command said."""
    output = tmp_path_factory.mktemp("pruned") / "pruned.safetensors"
    report = run_json(
        "prune", place / f"{request.param}.safetensors", "--pipeline-config", place / "encoders",
        "--output", output, "--prompts", place / "prompts.txt", "--sparsity", "30%", *FAST,
    )  # fmt: skip
    return output, report


def test_prune_writes_one_file_and_the_commands_read_it(place, pruned, tmp_path):
    output, report = pruned
    assert report["sparsity"] == pytest.approx(0.3, abs=0.02)
    staged = load_single_file(output)
    assert isinstance(staged, StagedDenoiser) and len(staged.stage_models) == 3
    assert staged.info.source.endswith(".safetensors")
    values = run_json("info", output)
    assert values["report"]["sparsity"] == report["sparsity"]
    assert "SD3Transformer2DModel in 3 stages" in run("info", output).output
    pipe = mosaicdiff.load_pipeline(output)  # it says itself where the encoders are
    assert isinstance(pipe.transformer, StagedDenoiser)
    made = picture(pipe)
    dense = picture(mosaicdiff.load_pipeline(staged.info.source, config=place / "encoders"))
    assert 1e-6 < abs(made - dense).max() < 1
    result = run("generate", output, "--prompt", "a cat", "--steps", 4, *SHORT,
                 "--output", tmp_path / "a.png")  # fmt: skip
    assert result.exit_code == 0 and (tmp_path / "a.png").is_file(), result.output
    times = run_json("bench", output, "--repeats", 1, "--pipeline-config", place / "encoders")
    parameters = times["memory"]["parameters"]
    assert parameters["pruned"] != parameters["dense"]


def test_a_pruned_file_becomes_a_folder_and_the_same_pictures(place, pruned, tmp_path):
    output, _ = pruned
    pipe = load_single_file_pipeline(output, place / "encoders")
    pipe.save_pretrained(tmp_path / "folder")
    assert (picture(pipe) == picture(mosaicdiff.load_pipeline(tmp_path / "folder"))).all()


def test_vae_and_encoders_are_copied_byte_for_byte(place, pruned):
    output, _ = pruned
    before, after = load_file(place / "whole.safetensors"), load_file(output)
    held = [name for name in after if name.startswith(("first_stage_model.", "other."))]
    assert all(torch.equal(before[name], after[name]) for name in held)
    whole = "whole" in str(load_single_file(output).info.source)
    assert len(held) == (len([n for n in before if not n.startswith("model.")]) if whole else 0)


def test_a_single_file_may_be_pruned_into_a_folder(place, tmp_path):
    run_json(
        "prune", place / "whole.safetensors", "--pipeline-config", place / "config", "--output",
        tmp_path / "out", "--prompts", place / "prompts.txt", "--stages", 1, *FAST,
    )  # fmt: skip
    assert isinstance(mosaicdiff.load_pipeline(tmp_path / "out").transformer, StagedDenoiser)


def test_mistakes_are_refused_before_any_work(tiny_sd3_folder, place, tmp_path):
    whole, output = place / "whole.safetensors", tmp_path / "out.safetensors"
    more = ("--prompts", place / "prompts.txt", *FAST)
    refused("config must be a folder or a Hub id", "prune", whole, "--output", output, *more)
    given = ("--pipeline-config", place / "config")
    refused("only a model that came in a single file", "prune", tiny_sd3_folder,
            "--output", output, *more)  # fmt: skip
    refused("config must be left out but for a single file", "prune", tiny_sd3_folder, *given,
            "--output", tmp_path / "out", *more)  # fmt: skip
    refused("which does not exist", "prune", tmp_path / "none.safetensors", *given,
            "--output", output, *more)  # fmt: skip
    refused("with model_index.json", "prune", whole, "--pipeline-config", tmp_path,
            "--output", output, *more)  # fmt: skip
    refused("one is in neither", "prune", place / "alone.safetensors", *given,
            "--output", output, *more)  # fmt: skip
    output.write_text("mine")
    result = run("prune", whole, *given, "--output", output, *more)
    assert result.exit_code == 2 and "path must be new" in result.stderr
    assert output.read_text() == "mine"
    refused("the folder or .safetensors of a pruned model", "info", tmp_path / "no.safetensors")


def test_one_file_for_two_denoisers_is_refused(tmp_path):
    pipe = PIPELINES["wan-2"].whole(tmp_path / "words")
    pipe.save_pretrained(tmp_path / "folder")
    source = write_single_file(
        tmp_path / "high.safetensors", wan_tensors(pipe.transformer.state_dict()), others=False
    )
    refused("must name a new folder for a pipeline with 2 denoisers", "prune", source,
            "--pipeline-config", tmp_path / "folder", "--output", tmp_path / "out.safetensors",
            "--calibration", source)  # fmt: skip


def test_a_file_of_another_model_is_refused(place, tmp_path, tiny):
    held = load_file(place / "whole.safetensors")
    name = "model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight"
    for spoiled in (
        {k: v for k, v in held.items() if k != name},
        held | {name: held[name][:-1].contiguous()},
    ):
        save_file(spoiled, tmp_path / "spoiled.safetensors")
        with pytest.raises(ValueError, match="must hold a SD3Transformer2DModel"):
            load_single_file_pipeline(tmp_path / "spoiled.safetensors", place / "config")
    with pytest.raises(ValueError, match="reads from single files, got DiTTransformer2DModel"):
        load_single_file_pipeline(place / "whole.safetensors", tiny.folder)


def test_a_pruned_file_of_another_family_is_refused(pruned, tiny):
    with pytest.raises(ValueError, match="SD3Transformer2DModel, got one with DiTTransformer2DM"):
        load_single_file_pipeline(pruned[0], tiny.folder)


@pytest.mark.parametrize(
    "name, write",
    [("sdxl", lambda state: unet_tensors(state, layers=1)), ("wan", wan_tensors)],
)
def test_other_families_from_file_to_file(tmp_path, name, write):
    """A file with a VAE in it (SDXL), and one of the denoiser alone (Wan)."""
    tiny = PIPELINES[name]
    pipe = tiny.whole(tmp_path / "words")
    pipe.save_pretrained(tmp_path / "folder")
    held = write(getattr(pipe, tiny.component).state_dict())
    if name == "sdxl":
        held |= vae_tensors(pipe.vae.state_dict())
        (tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "folder" / tiny.component / "diffusion_pytorch_model.safetensors").unlink()
    source = write_single_file(tmp_path / "dense.safetensors", held, others=False)
    dense = mosaicdiff.load_pipeline(source, config=tmp_path / "folder")
    assert (tiny.sample(dense) - tiny.sample(pipe)).abs().max() < 1e-5
    output = tmp_path / "pruned.safetensors"
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    options = [f"{key}={json.dumps(value)}" for key, value in tiny.options.items()]
    report = run_json(
        "prune", source, "--pipeline-config", tmp_path / "folder", "--output", output,
        "--prompts", tmp_path / "prompts.txt", "--activations", "trajectory", "--steps", 4,
        "--trajectories", 2, "--trajectory-batch", 1, "--sparsity", "30%",
        *(word for option in options for word in ("--pipeline-option", option)),
    )  # fmt: skip
    assert report["sparsity"] == pytest.approx(0.3, abs=0.03)
    pruned = mosaicdiff.load_pipeline(output)
    assert isinstance(getattr(pruned, tiny.component), StagedDenoiser)
    drawn = tiny.sample(pruned)
    assert torch.isfinite(drawn).all() and not torch.equal(drawn, tiny.sample(dense))
