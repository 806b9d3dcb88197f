"""`--activations trajectory` from the command line."""

import json

import pytest

from .commands import refused, run, run_json, stored

FAST = ("--activations", "trajectory", "--steps", 6, "--trajectories", 4, "--trajectory-batch", 2)


def test_prune_without_pictures(tiny, tmp_path):
    report = run_json(
        "prune", tiny.folder, "--output", tmp_path / "out", *FAST, "--guidance-scale", 1.5,
        "--timestep-weights", "6,5,4,3,2,1", "--sparsity", "30%",
    )  # fmt: skip
    assert report["sparsity"] == pytest.approx(0.3, abs=0.01)
    assert report["latent_power"] == 1.0
    trajectory = report["config"]["trajectory"]
    assert trajectory["weights"] == [6, 5, 4, 3, 2, 1] and trajectory["guidance_scale"] == 1.5
    assert trajectory["samples"] == 4 and trajectory["batch_size"] == 2


def test_a_calibration_of_trajectories_prunes_as_the_model_does(tiny, tmp_path):
    prompts = tmp_path / "labels.txt"
    prompts.write_text("7\n\n3\n")
    options = (*FAST, "--prompts", prompts)
    file = tmp_path / "tiny.cal"
    values = run_json("calibrate", tiny.folder, "--output", file, *options)
    assert values["bytes"] == pytest.approx(values["stated_bytes"], rel=0.05)
    direct = run_json("prune", tiny.folder, "--output", tmp_path / "direct", *options)
    loaded = run_json("prune", tiny.folder, "--output", tmp_path / "loaded", *options,
                      "--from", file)  # fmt: skip
    assert direct["stages"] == loaded["stages"]
    first, second = stored(tmp_path / "direct"), stored(tmp_path / "loaded")
    assert first.keys() == second.keys() and all((first[k] == second[k]).all() for k in first)
    # Other prompts may ask of it, as other samples may: it is what it is.
    again = run_json("prune", tiny.folder, "--output", tmp_path / "again", *FAST, "--from", file)
    assert again["stages"] == direct["stages"]
    points = run_json("sweep", tiny.folder, "--budgets", "20%,40%", *options)["points"]
    assert [point["sparsity"] for point in points] == pytest.approx([0.2, 0.4], abs=0.02)


def test_the_embedded_model_is_sampled(tmp_path):
    values = run_json("calibrate", "digits", "--output", tmp_path / "digits.cal", *FAST,
                      "--stages", 1, "--steps", 3, "--guidance-scale", 0)  # fmt: skip
    assert values["config"]["activations"] == "trajectory" and values["bytes"] > 0


def test_options_win_over_the_file_one_by_one(tiny, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({
        "activations": "trajectory", "steps": 5, "stages": 1,
        "trajectory": {"samples": 6, "batch_size": 3, "weights": "uniform",
                       "options": {"guidance_scale": 2.0}},
    }))  # fmt: skip
    options = ("prune", tiny.folder, "--config", file, "--dry-run")
    kept = run_json(*options)["config"]
    assert kept["activations"] == "trajectory" and kept["steps"] == 5
    assert kept["trajectory"]["samples"] == 6 and kept["trajectory"]["weights"] == "uniform"
    won = run_json(*options, "--trajectories", 2, "--pipeline-option", "guidance_scale=1.5")
    assert won["config"]["trajectory"] == kept["trajectory"] | {
        "samples": 2, "options": {"guidance_scale": 1.5},
    }  # fmt: skip


@pytest.mark.parametrize(
    "options, message",
    [
        (("--prompts", "nowhere.txt", *FAST), "nowhere.txt is no file: there is none"),
        (("--timestep-weights", "log", *FAST), "--timestep-weights must be one of log_decrease"),
        (("--timestep-weights", "1,2", *FAST), "weights must be 6, one for each sampling step"),
        (("--pipeline-option", "height", *FAST), "--pipeline-option must be NAME=VALUE"),
        (("--pipeline-option", "a=b", *FAST), "a value in JSON (texts in quotes)"),
        (("--pipeline-option", "height=512", *FAST), "options must be among guidance_scale"),
        (("--trajectories", 0, *FAST[:4]), "samples must be"),
        (("--guidance-scale", -1, *FAST), "guidance_scale must be finite and not negative"),
    ],
)
def test_what_cannot_be_is_refused(tiny, tmp_path, options, message):
    refused(message, "prune", tiny.folder, "--output", tmp_path / "out", *options)


def test_prompts_need_trajectories(tiny, tmp_path):
    prompts = tmp_path / "labels.txt"
    prompts.write_text("7\n")
    for command in ("prune", "calibrate"):
        refused("--activations trajectory", command, tiny.folder, "--calibration", tiny.latents,
                "--output", tmp_path / "out", "--prompts", prompts)  # fmt: skip


def test_help_shows_how():
    for command in ("prune", "calibrate"):
        shown = run(command, "--help").output
        assert "--activations trajectory" in shown and "--pipeline-option" in shown
