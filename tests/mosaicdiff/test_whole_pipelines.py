"""Whole pipelines of the families from the command line: prompts or captions in, pictures out."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import mosaicdiff
from mosaicdiff import PruneConfig, StagedDenoiser
from mosaicdiff.adapters import DENOISER_CLASSES

from .commands import kept_counts, run, run_json
from .tiny_pipelines import PIPELINES

pytestmark = pytest.mark.models

CAPTIONS = ["a cat", "b dog", "zzz 9", "a dog 7"]
KNOWN = [name for name, tiny in PIPELINES.items() if tiny.denoiser_class in DENOISER_CLASSES]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def steps_for(name):
    """Enough for both denoisers of a pipeline that has two."""
    return 9 if name == "wan-2" else 3


def as_options(values):
    texts = (f"{name}={json.dumps(value)}" for name, value in values.items())
    return [part for text in texts for part in ("--pipeline-option", text)]


@pytest.mark.parametrize("name", KNOWN)
def test_prune_by_prompts_save_load_and_sample(name, tmp_path):
    tiny, steps = PIPELINES[name], steps_for(name)
    dense = tiny.whole(tmp_path / "words")
    dense.save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS))
    output = tmp_path / "out"
    report = run_json("prune", tmp_path / "model", "--output", output, "--prompts", prompts,
                      "--activations", "trajectory", "--steps", steps, "--trajectories", 4,
                      "--trajectory-batch", 2, "--stages", 2, "--allocation", "score",
                      "--sparsity", "25%", *as_options(tiny.options))  # fmt: skip
    assert report["sparsity"] == pytest.approx(0.25, abs=0.05)
    first, second = kept_counts(report)
    assert first != second
    loaded = DiffusionPipeline.from_pretrained(output)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(getattr(loaded, tiny.component), StagedDenoiser)
    trajectory = {"samples": 4, "batch_size": 2, "options": dict(tiny.options)}
    config = PruneConfig(activations="trajectory", steps=steps, stages=2, sparsity=0.25,
                         allocation="score", trajectory=trajectory)  # fmt: skip
    held = mosaicdiff.load_pipeline(tmp_path / "model")
    mosaicdiff.prune(held, config, prompts=CAPTIONS)
    for scheduler in tiny.schedulers:
        for pipe in (dense, loaded, held):
            pipe.scheduler = scheduler()
        drawn, wanted = tiny.sample(loaded), tiny.sample(held)
        assert torch.isfinite(drawn).all()
        assert (drawn - wanted).abs().max() < 1e-5
        assert (drawn - tiny.sample(dense)).abs().max() > 1e-5
    other = type(loaded).from_pipe(loaded)
    other.set_progress_bar_config(disable=True)
    assert getattr(other, tiny.component) is getattr(loaded, tiny.component)
    assert (tiny.sample(other) - drawn).abs().max() < 1e-5
    half = DiffusionPipeline.from_pretrained(output, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert getattr(half, tiny.component).dtype == torch.bfloat16
    assert torch.isfinite(tiny.sample(half).float()).all()


@pytest.mark.parametrize("name", KNOWN)
def test_prune_by_images_with_captions(name, tmp_path):
    tiny = PIPELINES[name]
    pipe = tiny.whole(tmp_path / "words")
    pipe.save_pretrained(tmp_path / "model")
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(3)
    for number, caption in enumerate(CAPTIONS):
        pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    asked = as_options({k: v for k, v in tiny.options.items() if k != "num_frames"})
    null = 0.0 if name == "flux" else 0.2  # whose guidance is an input
    report = run_json("prune", tmp_path / "model", "--output", tmp_path / "out",
                      "--calibration", folder, "--steps", steps_for(name), "--samples", 8,
                      "--stages", 1, "--allocation", "uniform", "--null-share", null,
                      *asked)  # fmt: skip
    assert report["sparsity"] == pytest.approx(0.3, abs=0.05)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    assert torch.isfinite(tiny.sample(loaded)).all()


def test_half_precision_with_parts_in_float32(tmp_path):
    """Wan's first parameter stays float32 in a model of bfloat16: inputs are bfloat16."""
    tiny = PIPELINES["wan"]
    tiny.whole(tmp_path / "words").save_pretrained(tmp_path / "model")
    pipe = mosaicdiff.load_pipeline(tmp_path / "model", dtype=torch.bfloat16)
    assert next(pipe.transformer.parameters()).dtype == torch.float32
    trajectory = {"samples": 4, "batch_size": 2, "options": dict(tiny.options)}
    config = PruneConfig(activations="trajectory", steps=3, stages=2, trajectory=trajectory)
    mosaicdiff.prune(pipe, config, prompts=CAPTIONS)  # `optimal`: the probe runs too
    assert pipe.transformer.dtype == torch.bfloat16
    assert torch.isfinite(tiny.sample(pipe).float()).all()


def test_videos_are_drawn_as_moving_pictures(tmp_path):
    tiny = PIPELINES["wan"]
    tiny.whole(tmp_path / "words").save_pretrained(tmp_path / "model")
    asked = (*as_options(tiny.options), "--steps", 2)
    for target, prompts in ((tmp_path / "v.gif", ["a cat"]), (tmp_path / "v", CAPTIONS[:2])):
        named = [part for prompt in prompts for part in ("--prompt", prompt)]
        files = run_json("generate", tmp_path / "model", *named, "--output", target, *asked)[
            "files"
        ]
        assert len(files) == len(prompts)
        for file in files:
            with Image.open(file) as video:
                assert (video.format, video.n_frames) == ("GIF", tiny.options["num_frames"])
    for target, prompts in ((tmp_path / "v.png", CAPTIONS[:1]), (tmp_path / "w.gif", CAPTIONS[:2])):
        named = [part for prompt in prompts for part in ("--prompt", prompt)]
        result = run("generate", tmp_path / "model", *named, "--output", target, *asked)
        assert result.exit_code == 2 and "--output must be a" in result.stderr
