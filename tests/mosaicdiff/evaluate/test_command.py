"""`mosaicdiff evaluate` as it is typed: sweeps, prompts, scores, references, mistakes."""

import shlex

import numpy as np
import pytest

from mosaicdiff.cli.judging import parse_scales

from ..commands import refused, run, run_json
from .test_scores import clip_folder  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The embedded model pruned in a hurry."""
    output = tmp_path_factory.mktemp("small") / "digits"
    result = run("prune", "digits", "--output", output, "--samples", 16, "--steps", 4)
    assert result.exit_code == 0, result.output
    return output


FAST = ("--num-images", 6, "--steps", 3)


def test_a_sweep_of_guidance(small, tmp_path):
    grid, kept = tmp_path / "grid.png", tmp_path / "kept.npz"
    options = ("--guidance-scale", "1,2", "--grid", grid, "--save-reference", kept)
    values = run_json("evaluate", small, *FAST, *options)
    assert [(row["model"], row["guidance_scale"]) for row in values["rows"]] == [
        ("dense", 1), ("pruned", 1), ("dense", 2), ("pruned", 2),
    ]  # fmt: skip
    assert values["best_by"] == "frechet" and set(values["best"]) == {"dense", "pruned"}
    assert grid.stat().st_size > 5_000 and np.load(kept)["features"].shape == (1797, 64)
    assert values["setting"]["models"] == {"dense": "digits", "pruned": str(small)}
    command = shlex.split(values["setting"]["command"])
    assert command[:3] == ["mosaicdiff", "evaluate", str(small)]
    assert command[-1] == "--json" and "--guidance-scale" in command and "--seed" not in command


def test_the_command_that_is_told_gives_the_same_again(small):
    first = run_json("evaluate", small, *FAST, "--seed", 3)
    again = run_json(*shlex.split(first["setting"]["command"])[1:-1])
    assert [row["metrics"] for row in first["rows"]] == [row["metrics"] for row in again["rows"]]
    other = run_json("evaluate", small, *FAST)
    assert first["rows"][0]["metrics"] != other["rows"][0]["metrics"]


def test_tables_for_people(small):
    text = run("evaluate", small, *FAST, "--guidance-scale", "1,2").output
    assert "Each at its best Frechet distance: dense" in text and "fewer MACs" in text
    assert "PSNR to dense" in text and "biased upwards" in text
    text = run("evaluate", small, *FAST, "--features", "none").output
    assert "Frechet" not in text and "SSIM to dense" in text
    assert "without attention products" in text


def test_a_reference_of_ones_own(small, tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(64), sigma=np.eye(64))
    values = run_json("evaluate", small, *FAST, "--reference", tmp_path / "x.npz")
    assert "precision" not in values["rows"][0]["metrics"]
    assert any("holds statistics only" in note for note in values["notes"])
    assert values["setting"]["reference_images"] is None


def test_prompts_are_scored(tiny_sd3_folder, clip_folder, tmp_path):  # noqa: F811
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("number,text\n1,a cat\n2,a dog\n")
    values = run_json(
        "evaluate", tiny_sd3_folder, "--against", tiny_sd3_folder, "--prompts", prompts,
        "--steps", 2, "--num-images", 3, "--guidance-scale", "1,4", "--clip-score", clip_folder,
        "--pipeline-option", "max_sequence_length=8", "--image-size", "6x4",
    )  # fmt: skip
    assert values["setting"]["conditions"] == ["a cat", "a dog", "a cat"]
    assert values["setting"]["options"] == {
        "max_sequence_length": 8, "height": 6, "width": 4,
    }  # fmt: skip
    assert values["best_by"] == "clip_score"
    dense, same = values["rows"][:2]
    assert dense["metrics"]["clip_score"] == same["metrics"]["clip_score"] > 0
    assert same["metrics"]["mse_to_dense"] == 0 and same["metrics"]["psnr"] is None  # infinite
    passes = [row["passes_per_image"] for row in values["rows"]]
    assert passes == [2, 2, 4, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--guidance-scale", "1,x"), "--guidance-scale must be numbers that are not negative"),
        (("--guidance-scale", "2,2"), "each once, separated by commas, got '2,2'"),
        (("--num-images", 3), "num_images must be at least 4, got 3"),
        (("--num-images", 0), "--num-images must be at least 1, got 0"),
        (("--features", "vgg"), "--features must be digits, inception, inception:FILE or none"),
        (("--features", "none", "--reference", "x"), "--reference must be left out without"),
        (("--reference", "nowhere"), "--reference must be a folder of pictures or a .npz file"),
        (("--features", "digits", "--save-reference", "x.csv"), "--save-reference must be a .npz"),
        (("--best-by", "psnr"), "best_by must be frechet, precision, recall, inception_score, acc"),
        (("--prompts", "nowhere.txt"), "nowhere.txt is no file: there is none"),
        (("--clip-score", "./nowhere"), "--clip-score must be a CLIP model"),
        (("--image-size", "x"), "--image-size must be such as 512 or 480x832"),
        (("--pipeline-option", "strength=1"), "options must be among"),
        (("--neighbours", 0), "--neighbours must be at least 1"),
        (("--state", "x.json"), "state must be a .npz in a folder that exists, got x.json"),
    ],
)
def test_mistakes_are_refused(small, options, message):
    fast = () if "--num-images" in options else FAST
    refused(message, "evaluate", small, *fast, *options)


def test_prompts_of_a_model_asked_by_class_are_refused(small, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n")
    message = "prompts must be left out for DiTPipeline, which takes no text, got 1"
    refused(message, "evaluate", small, "--prompts", tmp_path / "p.txt")


def test_scales_are_numbers():
    assert parse_scales(None) is None and parse_scales("1, 1.5,4") == (1.0, 1.5, 4.0)
