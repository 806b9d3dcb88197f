"""The command line: what it prints, what it writes, how it fails."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mosaicdiff.cli import main


def run(*arguments: str):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def run_json(*arguments: str) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The embedded model pruned by 30%, quickly."""
    output = tmp_path_factory.mktemp("cli") / "digits-30"
    report = run_json("prune", "digits", "--output", output, "--samples", 64)
    return output, report


@pytest.mark.parametrize(
    "command",
    ["stages", "prune", "generate", "evaluate", "report", "bench", "info", "doctor"],
)
def test_help_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"mosaicdiff {command}" in result.output and "--json" in result.output


@pytest.mark.parametrize(
    "schedule, weight, threshold, first, last",
    [("linear", 0, 0.5, 98, 604), ("scaled_linear", 0, 0.7, 201, 781),
     ("squaredcos_cap_v2", 0, 0.5, 329, 1000)],
)  # fmt: skip
def test_stages_of_a_schedule(schedule, weight, threshold, first, last):
    options = ("--schedule", schedule, "--snr-weight", weight, "--threshold", threshold)
    values = run_json("stages", *options)
    middle = next(row for row in values["stages"] if row["name"] == "middle")
    assert (middle["first"], middle["last"]) == (first, last)
    assert middle["first_timestep"] == first - 1
    assert f"{first}..{last}" in run("stages", *options).output


@pytest.mark.parametrize("model", ["digits", None])
def test_stages_plot(tmp_path, model):
    where = (model,) if model else ("--schedule", "linear")
    values = run_json("stages", *where, "--plot", tmp_path / "stages.png")
    assert (tmp_path / "stages.png").stat().st_size > 10_000
    assert values["power"] == 1.0 if model is None else 0.5 < values["power"] < 2


def test_prune_writes_a_whole_folder(pruned):
    output, report = pruned
    assert report["sparsity"] == pytest.approx(0.3, abs=0.005)
    assert (output / "model_index.json").is_file()
    assert [path.name for path in output.parent.iterdir()] == ["digits-30"]
    assert not list(output.rglob("*.bin")) and not list(output.rglob("*.pt"))
    index = json.loads((output / "model_index.json").read_text())
    assert index["_name_or_path"] == "digits"
    modes = {path.stat().st_mode for path in (output / "transformer").iterdir()}
    assert len(modes) == 1


def test_info(pruned):
    output, report = pruned
    values = run_json("info", output)
    assert values["report"]["sparsity"] == report["sparsity"]
    assert values["config"]["source"] == "digits"
    text = run("info", output).output
    assert "3 stages" in text and "transformer_blocks.5.ff" in text


def test_generate(pruned, tmp_path):
    from PIL import Image

    output, _ = pruned
    sheet = tmp_path / "sheet.png"
    values = run_json("generate", output, "--classes", "3,1", "--steps", 4, "--output", sheet)
    assert values["classes"] == [3, 1] and Image.open(sheet).size == (64, 32)
    run_json("generate", "digits", "--classes", "3,1", "--steps", 4, "--output", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0000-class-3.png",
        "0001-class-1.png",
    ]


def test_evaluate(pruned, tmp_path):
    output, report = pruned
    options = ("--num-images", 20, "--steps", 10, "--grid", tmp_path / "grid.png")
    values = run_json("evaluate", output, *options)
    dense, small = values["rows"]
    assert values["against"] == "digits" and small["metrics"]["mse_to_dense"] > 0
    assert values["ratios"][0]["macs_with_attention"] == pytest.approx(
        report["macs_dense_with_attention"] / report["macs_with_attention"]
    )
    assert all(row["metrics"]["accuracy"] > 0.7 for row in (dense, small))
    assert (tmp_path / "grid.png").stat().st_size > 10_000
    assert "Frechet distance" in run("evaluate", output, "--num-images", 4, "--steps", 2).output


def test_bench_of_a_folder(pruned):
    output, _ = pruned
    values = run_json("bench", output, "--repeats", 2)
    names = [stage["name"] for stage in values["latencies"][0]["stages"]]
    assert names == ["early", "middle", "late"]
    assert [(row["mode"], row["network"]) for row in values["rows"]] == [
        (mode, network) for mode in ("eager", "fused") for network in ("dense", "pruned")
    ]
    shown = run("bench", output, "--repeats", 1, "--modes", "fused", "--steps", "10").output
    for word in ("efficiency", "over eager", "time of a call goes", "resident", "fewer"):
        assert word in shown


def test_doctor():
    values = run_json("doctor")
    assert values["packages"]["torch"] == torch.__version__.split("+")[0] or values["packages"]
    assert {"hessian_update_", "prune_columns"} <= set(values["kernels"]["operators"])
    assert "prune_columns" in run("doctor").output


def test_dry_run_writes_nothing(tmp_path):
    shares = ("prune", "digits", "--output", tmp_path / "out", "--dry-run", "--allocation", "score")
    values = run_json(*shares)
    assert values["sparsity"] == pytest.approx(0.3, abs=0.005)
    assert values["cost"]["hessian_bytes"] == 6 * 4 * (192 * 195 + 768 * 771)
    assert values["cost"]["seconds"] > 0
    assert "nothing was run" in run(*shares).output
    undecided = run("prune", "digits", "--output", tmp_path / "out", "--dry-run")
    assert undecided.exit_code == 0 and "decided by the calibration" in undecided.output
    assert not (tmp_path / "out").exists()


def test_config_file_and_options(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"sparsity": 0.2, "threshold": 0.5, "stages": 1}))
    options = ("--config", file, "--output", tmp_path / "out", "--dry-run")
    values = run_json("prune", "digits", *options, "--threshold", "0.6")
    assert values["config"]["sparsity"] == 0.2
    assert values["config"]["threshold"] == 0.6
    assert [row["name"] for row in values["stages"]] == ["all"]


@pytest.mark.parametrize(
    "options, names",
    [(("--stages", "104,570"), ["early", "middle", "late"]),
     (("--stages", "500"), ["stage-0", "stage-1"]),
     (("--allocation", "0.5,0.1,0.3"), ["early", "middle", "late"])],
)  # fmt: skip
def test_explicit_stages_and_shares(tmp_path, options, names):
    values = run_json("prune", "digits", "--output", tmp_path / "out", "--dry-run", *options)
    assert [row["name"] for row in values["stages"]] == names


def write_latents(path, latents, labels=(1,)):
    np.savez(path, latents=latents, labels=np.array(labels or np.zeros(0, int)))
    return path


def calibration_cases(folder):
    """Options that are refused, with a part of the message."""
    good = np.zeros((1, 1, 8, 8), np.float32)
    (folder / "empty").mkdir()
    (folder / "classless").mkdir()
    (folder / "classless" / "five").mkdir()
    (folder / "text.npz").write_text("not an archive")
    np.savez(folder / "half.npz", latents=good)
    return {
        "missing": (folder / "nowhere", "must be a folder or a file"),
        "empty": (folder / "empty", "no image was found"),
        "class": (folder / "classless", "named by a label number"),
        "broken": (folder / "text.npz", "could not be read"),
        "keys": (folder / "half.npz", "must hold 'latents' and 'labels'"),
        "none": (write_latents(folder / "none.npz", good[:0], []), "at least one sample"),
        "nan": (write_latents(folder / "nan.npz", good * np.nan), "must be finite"),
        "channels": (
            write_latents(folder / "channels.npz", np.zeros((1, 4, 8, 8), np.float32)),
            r"latents must be (B, 1, 8, 8)",
        ),
        "labels": (write_latents(folder / "labels.npz", good, [2000]), "0..1000"),
        "fractions": (write_latents(folder / "fractions.npz", good, [0.5]), "whole numbers"),
    }


CASES = ("missing", "empty", "class", "broken", "keys", "none", "nan", "channels", "labels")


@pytest.mark.parametrize("case", (*CASES, "fractions"))
def test_bad_calibration_is_refused(tmp_path, case):
    source, message = calibration_cases(tmp_path)[case]
    result = run("prune", "digits", "--output", tmp_path / "out", "--calibration", source)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (("digits", "--sparsity", "1.0"), "sparsity must be in [0, 1)"),
        (("digits", "--sparsity", "-0.5"), "sparsity must be in [0, 1)"),
        (("digits", "--sparsity", "0.97"), "sparsity must be at most 0.95"),
        (("nothing-of-the-kind",), "must be 'digits', a local folder or a Hub id"),
        (("FOLDER",), "holds no model_index.json"),
        (("digits", "--device", "abacus"), "--device must be auto, cpu or cuda"),
        (("digits", "--stages", "two"), "--stages must be a number, auto, or timesteps"),
        (("digits", "--stages", "0"), "stages must be a whole number of at least 1"),
        (
            ("digits", "--allocation", "best"),
            "--allocation must be score, uniform, optimal, evolutionary or shares",
        ),
        (("digits", "--allocation", "0.1,0.2"), "one share for each of 3 stages"),
        (("digits", "--steps", "5000"), "steps must be at most 1000"),
        (("digits", "--config", "nowhere.json"), "but there is none"),
    ],
)
def test_bad_requests_are_refused(tmp_path, options, message):
    (tmp_path / "folder").mkdir()
    options = [str(tmp_path / "folder") if o == "FOLDER" else o for o in options]
    result = run("prune", *options, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_gpu_is_refused(tmp_path):
    result = run("prune", "digits", "--output", tmp_path / "out", "--device", "cuda")
    assert result.exit_code == 2 and "without a CUDA device" in result.stderr


def test_an_output_that_holds_files_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    result = run("prune", "digits", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "--overwrite" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    result = run("prune", "digits", "--output", tmp_path / "out" / "precious")
    assert result.exit_code == 2 and "it is a file" in result.stderr


def test_a_scheduler_without_snr_is_refused(tmp_path):
    import shutil

    from diffusers import IPNDMScheduler

    from mosaicdiff.digits import MODEL_FOLDER

    folder = tmp_path / "flow"
    shutil.copytree(MODEL_FOLDER, folder)
    IPNDMScheduler().save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = "IPNDMScheduler"
    (folder / "model_index.json").write_text(json.dumps(index))
    result = run("prune", folder, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert "must be variance preserving" in result.stderr


def test_a_model_without_calibration_is_refused(tmp_path):
    import shutil

    from mosaicdiff.digits import MODEL_FOLDER

    shutil.copytree(MODEL_FOLDER, tmp_path / "copy")
    result = run("prune", tmp_path / "copy", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "a source must be given" in result.stderr


def test_images_by_class_calibrate(tmp_path):
    from PIL import Image

    from mosaicdiff.cli.plots import picture_grid
    from mosaicdiff.digits import load_images

    images, labels = load_images()
    for index in range(30):
        folder = tmp_path / "images" / str(int(labels[index]))
        folder.mkdir(parents=True, exist_ok=True)
        sheet = picture_grid(images[index : index + 1], 1, scale=3).squeeze()
        Image.fromarray(sheet).save(folder / f"{index}.png")
    report = run_json(
        "prune", "digits", "--output", tmp_path / "out", "--calibration", tmp_path / "images",
        "--samples", 32,
    )  # fmt: skip
    assert 0.5 < report["latent_power"] < 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("stages",), "either MODEL or --schedule"),
        (("stages", "digits", "--schedule", "linear"), "either MODEL or --schedule"),
        (("stages", "--schedule", "cosine"), "name must be one of linear"),
        (("stages", "--schedule", "linear", "--threshold", "2"), "threshold must be in (0, 1)"),
        (("stages", "--schedule", "linear", "--plot", "x.txt"), "--plot must end in"),
        (("generate", "digits", "--classes", "a", "--output", "x.png"), "--classes must be whole"),
        (
            ("generate", "digits", "--classes", "3,12", "--output", "x.png"),
            "must be in 0..9, got 3,12",
        ),
        (("generate", "digits", "--prompt", "a cat", "--output", "x.png"), "which takes no text"),
        (("generate", "digits", "--steps", "0", "--output", "x.png"), "--steps must be at least 1"),
        (("evaluate", "digits"), "--against must name the dense model"),
        (("bench", "digits"), "must be pruned, but it is dense"),
        (("bench", "digits", "--sparsity", 0.5), "--sparsity must be left out with a pruned fol"),
        (("bench", "dit-z-9"), "must be a pruned folder or one of dit-xl-2, dit-b-4"),
        (("info", "nowhere"), "must be the folder or .safetensors of a pruned"),
    ],
)
def test_other_commands_refuse(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_version_is_refused(pruned, tmp_path):
    import shutil

    shutil.copytree(pruned[0], tmp_path / "m")
    file = tmp_path / "m" / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 1}))
    for command in (("info",), ("evaluate", "--num-images", "2"), ("bench",)):
        result = run(command[0], tmp_path / "m", *command[1:])
        assert result.exit_code == 2, result.output
        assert "format_version must be 3, got 1" in result.stderr


def test_errors_can_be_read_as_json():
    result = run("stages", "--schedule", "cosine", "--json")
    assert result.exit_code == 2 and "name must be" in json.loads(result.stdout)["error"]


def test_overwriting_spares_other_folders_and_the_model_itself(pruned, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = run("prune", "digits", "--output", tmp_path, "--overwrite")
    assert result.exit_code == 2 and "holds other files" in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    result = run("prune", pruned[0], "--output", pruned[0], "--overwrite")
    assert result.exit_code == 2 and "the dense model would be lost" in result.stderr
