"""A whole SD3 pipeline from the command line: prompts, every granularity, pictures, mistakes."""

import functools

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

import mosaicdiff
from mosaicdiff import StagedDenoiser

from .commands import kept_counts, refused, run, run_json, stored

#: Few text tokens of T5, so that a call is quick.
SHORT = ("--pipeline-option", "max_sequence_length=8")
SAMPLED = ("--activations", "trajectory", "--steps", 4, "--trajectories", 4)
FAST = (*SAMPLED, "--trajectory-batch", 2, *SHORT)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\na dog\nb cat 7\n")
    return file


def picture(pipe, prompt="a cat", **options):
    return pipe(
        prompt, num_inference_steps=4, generator=torch.manual_seed(5), output_type="np",
        max_sequence_length=8, **options,
    ).images  # fmt: skip


CASES = {
    "three stages": ("--sparsity", "30%"),
    "in packages": ("--sparsity", "30%", "--packages", 2),
    "as OBS-Diff": ("--sparsity", "30%", "--stages", 1, "--allocation", "uniform", "--packages", 4),
    "unstructured": ("--granularity", "unstructured", "--sparsity", "60%"),
    "2:4": ("--granularity", "2:4", "--packages", 2),
    "2:4 in stages": ("--granularity", "2:4", "--stages", 3, "--exclude", "*.to_add_out"),
}


@pytest.mark.parametrize("case", CASES)
def test_prune_from_prompts(tiny_sd3_folder, prompts, tmp_path, case):
    options, output = CASES[case], tmp_path / "out"
    report = run_json("prune", tiny_sd3_folder, "--output", output, "--prompts", prompts,
                      *FAST, *options)  # fmt: skip
    of_weights = "--granularity" in options
    share = 0.6 if case == "unstructured" else 0.5 if of_weights else 0.3
    assert report["sparsity"] == pytest.approx(share, abs=0.02)
    staged = 3 if "--stages" not in options and not of_weights or 3 in options else 1
    assert len(report["stages"]) == staged
    assert not (tmp_path / "out.packages").exists()
    pipe = DiffusionPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.transformer, StagedDenoiser) and pipe.text_encoder_3 is not None
    made, dense = picture(pipe), picture(mosaicdiff.load_pipeline(tiny_sd3_folder))
    assert made.shape == dense.shape == (1, 8, 8, 1)
    assert 1e-6 < abs(made - dense).max() < 1
    assert (picture(pipe, "a dog") != made).any()
    values = run_json("info", output)
    assert values["report"]["sparsity"] == report["sparsity"]
    assert "SD3Transformer2DModel" in run("info", output).output
    if of_weights:
        for row in pipe.transformer.masks:
            assert not any(name.endswith("to_add_out") for name in row) or staged == 1
            if "2:4" in options:
                assert all((m.reshape(-1, 4).sum(1) == 2).all() for m in row.values())
    else:
        for kept in kept_counts(report):
            for end in ("transformer_blocks.0", "transformer_blocks.3"):  # whole, as in the paper
                assert kept[f"{end}.attn"] == 4 and kept[f"{end}.ff"] == 128


def test_the_same_command_writes_the_same_bits_and_other_prompts_do_not(
    tiny_sd3_folder, prompts, tmp_path
):
    options = ("prune", tiny_sd3_folder, "--prompts", prompts, *FAST, "--packages", 2,
               "--stages", 1, "--allocation", "uniform")  # fmt: skip
    for name in ("a", "b"):
        run_json(*options, "--output", tmp_path / name)
    prompts.write_text("a dog 9\nzzz\n")
    run_json(*options, "--output", tmp_path / "c")
    a, b, c = (stored(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a if a[name].shape == c[name].shape)


def test_dry_runs_print_a_plan_and_write_nothing(tiny_sd3_folder, prompts, tmp_path):
    options = ("prune", tiny_sd3_folder, "--output", tmp_path / "out", "--prompts", prompts,
               *FAST, "--dry-run")  # fmt: skip
    shared = run_json(*options, "--allocation", "uniform", "--packages", 3)
    assert shared["packages"]["count"] == 3 and shared["sparsity"] == pytest.approx(0.3, abs=0.01)
    assert "53 linears" in run(*options, "--granularity", "2:4").stdout
    assert "decided by the calibration" in run(*options).stdout
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt"}


def test_a_calibration_serves_prune_and_sweep(tiny_sd3_folder, prompts, tmp_path):
    file = tmp_path / "sd3.cal"
    run_json("calibrate", tiny_sd3_folder, "--output", file, "--prompts", prompts, *FAST)
    report = run_json("prune", tiny_sd3_folder, "--output", tmp_path / "out", "--from", file,
                      *FAST, "--sparsity", "20%")  # fmt: skip
    direct = run_json("prune", tiny_sd3_folder, "--output", tmp_path / "direct",
                      "--prompts", prompts, *FAST, "--sparsity", "20%")  # fmt: skip
    assert kept_counts(report) == kept_counts(direct)
    swept = run_json("sweep", tiny_sd3_folder, "--prompts", prompts, *FAST,
                     "--budgets", "10%,20%", "--measure")["points"]  # fmt: skip
    assert swept[0]["measured_error"] < swept[1]["measured_error"]


PATTERNS = ("--granularity", "2:4", "--include", "*.nothing")


@pytest.mark.parametrize(
    "options, message",
    [
        ((*FAST, "--pipeline-option", "height=7"), "batch 1 of 2 failed: ValueError: `height` and"),
        ((*FAST, "--granularity", "4:4"), "granularity N:M must have 1 <= N < M, got '4:4'"),
        ((*FAST, *PATTERNS), "include must name layers of the denoiser, but nothing matches"),
        ((*FAST, "--exclude", "*.nothing"), "exclude must name layers of the denoiser"),
        ((*FAST, "--pipeline-option", "strength=1"), "options must be among callback_on_step_end"),
        ((*FAST, "--guidance-scale", -1), "guidance_scale must be finite and not negative"),
        ((*FAST, "--timestep-weights", "1,2"), "weights must be 4, one for each sampling step"),
        ((*FAST, "--memory", "1kB", "--packages", "auto"), "memory must be at least"),
        ((), "prompts must be left out with activations='noised'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_told(tiny_sd3_folder, prompts, tmp_path, options, message):
    refused(message, "prune", tiny_sd3_folder, "--output", tmp_path / "out", "--prompts", prompts,
            *options)  # fmt: skip


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "prompts must be given with activations='trajectory', got None. Give a list"),
        (b" \n\n", "has no line that is not blank"),
        ("caf\u00e9".encode("latin-1"), "must be text in UTF-8, got byte 0xe9 at byte 3 (line 1)"),
    ],
)
def test_prompts_that_are_none_are_told(tiny_sd3_folder, tmp_path, data, message):
    given = ()
    if data is not None:
        (tmp_path / "bad.txt").write_bytes(data)
        given = ("--prompts", tmp_path / "bad.txt")
    for command, *more in (
        ("prune", "--output", tmp_path / "out"),
        ("calibrate", "--output", tmp_path / "x.cal"),
        ("sweep", "--budgets", "10%"),
    ):
        refused(message, command, tiny_sd3_folder, *more, *given, *FAST)


def test_whatever_the_pipeline_raises_is_a_message(tiny_sd3_folder, prompts, tmp_path):
    """Not only ValueError: pipelines raise what they like."""
    calls = (
        ("prune", "--prompts", prompts, "--output", tmp_path / "out", *FAST),
        ("generate", "--prompt", "a cat", "--output", tmp_path / "out"),
    )
    for command, *options in calls:
        result = run(command, tiny_sd3_folder, *options, "--pipeline-option", "clip_skip=9")
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        assert "failed: IndexError: tuple index out of range" in result.stderr
        assert "batch 1 of" in result.stderr and not (tmp_path / "out").exists()


def test_a_run_that_failed_before_its_first_package_is_no_obstacle(
    tiny_sd3_folder, prompts, tmp_path
):
    options = ("prune", tiny_sd3_folder, "--output", tmp_path / "out", "--prompts", prompts,
               *FAST, "--packages", 2, "--allocation", "uniform")  # fmt: skip
    refused("batch 1 of 2 failed", *options, "--pipeline-option", "height=7")
    run_json(*options)
    assert not (tmp_path / "out.packages").exists()


def test_generate_from_prompts(tiny_sd3_folder, prompts, tmp_path):
    from PIL import Image

    run_json("prune", tiny_sd3_folder, "--output", tmp_path / "pruned", "--prompts", prompts,
             *FAST, "--sparsity", "50%", "--allocation", "uniform")  # fmt: skip
    asked = ("--prompt", "a cat", "--prompt", "a dog", "--steps", 4, *SHORT)
    for model in (tiny_sd3_folder, tmp_path / "pruned"):
        sheet = tmp_path / f"{model.name}.png"
        values = run_json("generate", model, *asked, "--output", sheet)
        assert values["prompts"] == ["a cat", "a dog"] and values["files"] == [str(sheet)]
        assert Image.open(sheet).size == (16, 8)
    folder = tmp_path / "pictures"
    run_json("generate", tiny_sd3_folder, *asked, "--output", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["0000.png", "0001.png"]
    # A picture's noise is its own, whatever is drawn beside it.
    run_json("generate", tiny_sd3_folder, *asked[:2], *asked[4:], "--output", tmp_path / "one")
    assert (tmp_path / "one" / "0000.png").read_bytes() == (folder / "0000.png").read_bytes()
    assert (folder / "0001.png").read_bytes() != (folder / "0000.png").read_bytes()
    wide = ("--pipeline-option", "width=12", "--guidance-scale", 1)
    run_json("generate", tiny_sd3_folder, *asked, *wide, "--output", tmp_path / "wide.png")
    assert Image.open(tmp_path / "wide.png").size == (24, 8)


def test_without_a_word_the_pipelines_own_steps_and_guidance(
    tiny_sd3_folder, tmp_path, monkeypatch
):
    given, original = {}, StableDiffusion3Pipeline.__call__

    @functools.wraps(original)
    def look(self, **options):
        given.update(options)
        return original(self, **options | {"num_inference_steps": 1})

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", look)
    run_json("generate", tiny_sd3_folder, "--prompt", "a", *SHORT, "--output", tmp_path / "a.png")
    assert given["prompt"] == ["a"] and given["max_sequence_length"] == 8
    assert not {"num_inference_steps", "guidance_scale"} & set(given)


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "--prompt must be given for StableDiffusion3Pipeline, which is asked in words"),
        (("--classes", "3,1"), "--classes must be left out for StableDiffusion3Pipeline"),
        (("--classes", "3", "--prompt", "a"), "--classes must be left out with --prompt, got 3"),
        (("--prompt", "a", "--pipeline-option", "strength=1"), "options must be among"),
        (("--prompt", "a", "--pipeline-option", "height"), "must be NAME=VALUE"),
        (("--prompt", "a", "--pipeline-option", "height=7"), "batch 1 of 1 failed: ValueError"),
        (("--prompt", "a", "--steps", 0), "--steps must be at least 1"),
    ],
)
def test_what_cannot_be_generated_is_refused(tiny_sd3_folder, tmp_path, options, message):
    refused(message, "generate", tiny_sd3_folder, *options, "--output", tmp_path / "out")


def test_prompts_for_classes_are_refused(tiny, tmp_path):
    refused("--prompt must be left out for DiTPipeline, which takes no text, got 'a cat'",
            "generate", tiny.folder, "--prompt", "a cat", "--output", tmp_path / "out")  # fmt: skip


def test_what_judges_wants_prompts_and_what_times_works(tiny_sd3_folder, prompts, tmp_path):
    output = tmp_path / "out"
    run_json("prune", tiny_sd3_folder, "--output", output, "--prompts", prompts, *FAST,
             "--allocation", "uniform")  # fmt: skip
    refused("prompts must be given for StableDiffusion3Pipeline", "evaluate", output)
    refused("--against must name the dense model", "evaluate", tiny_sd3_folder)
    judged = run_json("evaluate", output, "--prompts", prompts, "--steps", 2)
    assert judged["setting"]["condition_kind"] == "prompt"
    assert judged["rows"][1]["metrics"]["mse_to_dense"] > 0
    timed = run_json("bench", output, "--repeats", 1)
    names = [stage["name"] for stage in timed["latencies"][0]["stages"]]
    assert names == ["early", "middle", "late"]
    assert all(row["macs_ratio"] > 1 for row in timed["rows"] if row["network"] == "pruned")
    refused("must be pruned, but it is dense", "bench", tiny_sd3_folder)
