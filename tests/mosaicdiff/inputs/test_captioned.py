"""Images with captions, and latents in files, as calibration; what is kept of them on disk."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.inputs.cache import cache_folder
from mosaicdiff.inputs.load import load_calibration

from ..commands import kept_counts, refused, run_json, weights_file
from ..tiny_pipelines import PIPELINES

pytestmark = pytest.mark.models

CAPTIONS = ["a cat", "a dog", "zzz 9", "a cat", "b", "a dog 7"]
SMALL = ("--samples", 16, "--steps", 4, "--stages", 1, "--allocation", "uniform")
QUICK = (*SMALL, "--pipeline-option", "max_sequence_length=8")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def images(tmp_path):
    """Six pictures without captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(3)
    for number in range(len(CAPTIONS)):
        pixels = generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def captioned(images):
    for number, caption in enumerate(CAPTIONS):
        (images / f"{number}.txt").write_text(caption)
    return images


def load(folder, pipe, **options):
    return load_calibration(folder, pipe, options={"max_sequence_length": 8}, **options)


def whole(batches):
    """All rows of some batches."""
    latents = torch.cat([latents for latents, _ in batches])
    names = batches[0][1]
    return latents, {name: torch.cat([inputs[name] for _, inputs in batches]) for name in names}


def same(one, other):
    (x, a), (y, b) = whole(one), whole(other)
    return torch.equal(x, y) and a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_images_and_captions_become_latents_and_conditions(tiny_sd3_folder, captioned):
    pipe = mosaicdiff.load_pipeline(tiny_sd3_folder)
    latents, inputs = whole(load(captioned, pipe))
    assert latents.shape == (6, 2, 8, 8) and latents.dtype == torch.float32
    config = pipe.vae.config
    texts = inputs["encoder_hidden_states"]
    assert torch.equal(texts[0], texts[3]) and not torch.equal(texts[0], texts[1])
    wanted = pipe.encode_prompt(["zzz 9"], None, None, max_sequence_length=8)
    torch.testing.assert_close(texts[2], wanted[0][0])
    torch.testing.assert_close(inputs["negative_pooled_projections"][5], wanted[3][0])
    z = pipe.vae.encode(_fitted(captioned / "2.png")).latent_dist.mode()
    torch.testing.assert_close(latents[2:3], (z - config.shift_factor) * config.scaling_factor)


def _fitted(path):
    fitted = ImageOps.fit(Image.open(path).convert("L"), (8, 8), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(fitted, np.float32)[None, None].copy()) / 127.5 - 1


def test_prune_by_captions_prompts_and_latents_alike(tiny_sd3_folder, captioned, tmp_path):
    """Four ways to hand over the same samples."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("id,caption\n" + "".join(f"{n},{c}\n" for n, c in enumerate(CAPTIONS)))
    bare = tmp_path / "bare"
    shutil.copytree(captioned, bare, ignore=shutil.ignore_patterns("*.txt"))
    pipe = mosaicdiff.load_pipeline(tiny_sd3_folder)
    latents, inputs = whole(load(captioned, pipe))
    named, plain = tmp_path / "latents", tmp_path / "plain"
    for folder in (named, plain):
        folder.mkdir()
    for number, rows in enumerate((slice(0, 4), slice(4, 6))):
        part = {name: value[rows].contiguous() for name, value in inputs.items()}
        save_file({"latents": latents[rows].clone()}, plain / f"{number}.safetensors")
        part["negative_pooled_projections"] = part["negative_pooled_projections"][:1].clone()
        held = {"latents": latents[rows].clone(), **part}
        if number:
            np.savez(named / "1.npz", **{k: v.numpy() for k, v in held.items()})
        else:
            save_file(held, named / "0.safetensors")
    ways = {
        "captions": ("--calibration", captioned, *QUICK),
        "prompts": ("--calibration", bare, "--prompts", prompts, *QUICK),
        "latents": ("--calibration", named, *SMALL),
        "both": ("--calibration", plain, "--prompts", prompts, *QUICK),
    }
    kept, stored = [], []
    for name, options in ways.items():
        output = tmp_path / "out" / name
        report = run_json("prune", tiny_sd3_folder, "--output", output, *options)
        kept.append(kept_counts(report))
        stored.append(load_file(weights_file(output)))
        differ = [
            key for key, value in stored[0].items() if not torch.equal(value, stored[-1][key])
        ]
        assert not differ, name
    assert all(row == kept[0] for row in kept)
    pruned = DiffusionPipeline.from_pretrained(output)
    pruned.set_progress_bar_config(disable=True)
    drawn = pruned("a cat", num_inference_steps=3, output_type="pt", max_sequence_length=8).images
    assert torch.isfinite(drawn).all()


def test_what_was_encoded_is_kept_and_taken_again(tiny_sd3_folder, captioned, monkeypatch):
    pipe = mosaicdiff.load_pipeline(tiny_sd3_folder)
    made = load(captioned, pipe, cache=False)
    assert not cache_folder().exists()
    first = load(captioned, pipe)
    assert same(made, first) and len(list(cache_folder().iterdir())) == 1
    monkeypatch.setattr(type(pipe.vae), "encode", None)  # neither VAE nor texts are needed again
    monkeypatch.setattr(type(pipe), "encode_prompt", None)
    again = mosaicdiff.load_pipeline(tiny_sd3_folder)
    assert same(first, load(captioned, again))


@pytest.mark.parametrize("change", ["caption", "pixels", "size", "weights", "vocabulary"])
def test_what_is_kept_is_of_these_inputs_only(tiny_sd3_folder, captioned, change):
    pipe = mosaicdiff.load_pipeline(tiny_sd3_folder)
    first = load(captioned, pipe)
    options = {"max_sequence_length": 8}
    if change == "caption":
        (captioned / "0.txt").write_text("other")
    elif change == "pixels":
        Image.new("RGB", (9, 9)).save(captioned / "0.png")
    elif change == "size":
        options["height"] = 12
    elif change == "weights":
        with torch.no_grad():
            next(pipe.text_encoder.parameters()).add_(1)
    else:
        pipe.tokenizer.add_tokens(["zzz"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    second = load_calibration(captioned, pipe, options=options)
    assert len(list(cache_folder().iterdir())) == 2
    assert whole(first)[0].shape != whole(second)[0].shape or not same(first, second)


@pytest.mark.parametrize("damage", ["cut", "bits", "missing", "index", "renamed"])
def test_a_damaged_cache_is_told_of_and_made_again(tiny_sd3_folder, captioned, damage):
    pipe = mosaicdiff.load_pipeline(tiny_sd3_folder)
    first = [(latents.clone(), inputs) for latents, inputs in load(captioned, pipe, cache=False)]
    load(captioned, pipe)
    (place,) = cache_folder().iterdir()
    file, index = place / "00000.safetensors", place / "index.json"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-8])
    elif damage == "bits":
        data[-3] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    elif damage == "index":
        index.write_text("{")
    else:
        values = json.loads(index.read_text())
        index.write_text(json.dumps(values | {"key": "another"}))
    with pytest.warns(RuntimeWarning, match=f"kept in {place} are damaged .*: they are made again"):
        again = load(captioned, pipe)
    assert same(first, again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(first, load(captioned, pipe))


def test_a_run_that_fails_keeps_nothing(tiny_sd3_folder, captioned, monkeypatch):
    pipe = mosaicdiff.load_pipeline(tiny_sd3_folder)

    def fail(*args, **options):
        raise RuntimeError("full")

    monkeypatch.setattr(pipe.vae, "encode", fail)
    with pytest.raises(RuntimeError, match="full"):
        load(captioned, pipe)
    assert not any(cache_folder().iterdir())


def test_a_cache_that_cannot_be_written_is_told(tiny_sd3_folder, captioned, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"could not be kept in .* \(--no-cache\)"):
        load(captioned, mosaicdiff.load_pipeline(tiny_sd3_folder))


def test_mistakes_are_told_before_work_starts(tiny_sd3_folder, tiny, images, tmp_path):
    def told(message, *options, model=tiny_sd3_folder):
        refused(message, "prune", model, "--output", tmp_path / "out", *options)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    both = ("--calibration", images, "--prompts", prompts)
    told("must have captions, got none: images alone do not say", "--calibration", images)
    told("prompts must be as many as images in", *both)
    told("--prompt-column must be left out without --prompts", "--prompt-column", "x")
    told("prompts must be left out with activations='noised' and no images", "--prompts", prompts)
    told("prompts must be left out with activations='noised' for a class-conditional",
         "--calibration", tiny.latents, "--prompts", prompts, model=tiny.folder)  # fmt: skip
    told("--image-size must be such as 512", *both, "--image-size", "8x")
    told("--image-size must be left out with --pipeline-option height", *both, "--image-size", 8,
         "--pipeline-option", "height=8")  # fmt: skip
    told("trajectory must be left out with activations='noised' where no texts are encoded",
         "--calibration", tiny.latents, "--image-size", 8)  # fmt: skip
    told("options must be among", *both, "--pipeline-option", "strength=1")
    told("batch_size must be a whole number or 'auto', got 'some'", "--batch-size", "some")
    (images / "0.txt").write_text("a")
    told("1.png in", "--calibration", images)
    for number in range(6):
        (images / f"{number}.txt").write_text("a")
    told("prompts must be left out where the images have captions", *both)
    (images / "1.png").write_bytes(b"none")
    told("1.png could not be read as an image", "--calibration", images)
    np.savez(images / "l.npz", latents=np.zeros((1, 2, 8, 8)))
    told("must hold images or latents, got both", "--calibration", images)


def test_sizes_of_ones_own(tiny_sd3_folder, captioned, tmp_path):
    options = ("prune", tiny_sd3_folder, "--output", tmp_path / "out", "--calibration", captioned)
    run_json(*options, *QUICK, "--image-size", "8x12", "--batch-size", "auto")
    pipe = mosaicdiff.load_pipeline(tiny_sd3_folder)
    ((latents, _),) = load_calibration(
        captioned, pipe, options={"height": 8, "width": 12, "max_sequence_length": 8}
    )
    assert latents.shape == (6, 2, 8, 12)


def test_a_pipeline_without_a_null_condition_says_so_before_images_are_encoded(
    captioned, tmp_path, monkeypatch
):
    tiny = PIPELINES["flux"]
    pipe = tiny.whole(tmp_path / "words")
    monkeypatch.setattr(type(pipe.vae), "encode", None)
    config = PruneConfig(steps=3, trajectory={"options": dict(tiny.options)})
    with pytest.raises(ValueError, match="null_share must be 0 where FluxPipeline is called with"):
        mosaicdiff.prune(pipe, config, calibration=captioned)


def test_videos_that_move_and_pictures_as_videos_of_one_frame(tmp_path):
    tiny = PIPELINES["wan"]
    pipe = tiny.whole(tmp_path / "words")
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(3):
        frames = [Image.new("RGB", (16, 16), (40 * number, 50 * f, 9)) for f in range(6)]
        frames[0].save(folder / f"{number}.gif", save_all=True, append_images=frames[1:])
        (folder / f"{number}.txt").write_text(f"a cat {number}")
    options = dict(tiny.options)
    ((latents, inputs),) = load_calibration(folder, pipe, options=options)
    assert latents.shape == (3, 4, 3, 8, 8)  # 5 frames are 3 of latents
    assert (latents[:, :, 1] - latents[:, :, 0]).abs().max() > 1e-3
    assert inputs["negative_encoder_hidden_states"].shape == (3, 8, 12)
    del options["num_frames"]
    ((still, _),) = load_calibration(folder, pipe, options=options)
    assert still.shape == (3, 4, 1, 8, 8)
    with pytest.raises(ValueError, match="must have 9 frames, got 6. Ask for fewer"):
        load_calibration(folder, pipe, options=options | {"num_frames": 9})
