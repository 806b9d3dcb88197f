"""Encoded pixels are what the family's own pipeline would decode."""

import pytest
import torch

from mosaicdiff.inputs.captioned import takes_frames
from mosaicdiff.inputs.encoding import batch_rows, encode_pixels, normalise, pack

from ..tiny_pipelines import PIPELINES


@pytest.mark.parametrize("name", PIPELINES)
def test_latents_are_scaled_and_packed_as_the_pipeline_undoes(name, tmp_path, monkeypatch):
    tiny = PIPELINES[name]
    pipe = tiny.whole(tmp_path / "words")
    final = tiny.sample(pipe, output_type="latent")
    given = []
    decode = pipe.vae.decode

    def look(latents, *args, **options):
        given.append(latents)
        return decode(latents, *args, **options)

    monkeypatch.setattr(pipe.vae, "decode", look)
    tiny.sample(pipe)
    back = pack(pipe, normalise(pipe.vae, given[0]))
    torch.testing.assert_close(back, final, rtol=1e-4, atol=1e-5)
    shift = (normalise(pipe.vae, given[0]) - given[0]).abs().max()
    assert shift > 0.01  # there was something to undo


@pytest.mark.parametrize("name", PIPELINES)
def test_pixels_are_encoded_as_the_denoiser_takes_them(name, tmp_path):
    tiny = PIPELINES[name]
    pipe = tiny.whole(tmp_path / "words")
    final = tiny.sample(pipe, output_type="latent")
    moving = takes_frames(pipe.vae)
    assert moving == (tiny.frames or name == "qwen-image")
    frames = tiny.options.get("num_frames", 1)
    side = tiny.options.get("height", 8 if name == "sd3" else 16)
    shape = (2, pipe.vae.config.get("in_channels", 3), *([frames] if moving else []), side, side)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_pixels(pipe, pixels)
    assert latents.shape[1:] == final.shape[1:] and latents.dtype == torch.float32
    assert torch.isfinite(latents).all() and latents.std() > 1e-3
    alone = encode_pixels(pipe, pixels[1:])
    torch.testing.assert_close(alone, latents[1:], rtol=1e-4, atol=1e-5)


def test_half_precision_is_left_where_it_would_overflow(tmp_path):
    pipe = PIPELINES["sdxl"].whole(tmp_path / "words")
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    wanted = encode_pixels(pipe, pixels)
    pipe.vae.half()
    assert pipe.vae.config.force_upcast
    found = encode_pixels(pipe, pixels)
    assert pipe.vae.dtype == torch.float16
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


def test_a_vae_that_does_not_say_its_scale_is_refused(tmp_path):
    pipe = PIPELINES["wan"].whole(tmp_path / "words")
    pipe.vae.register_to_config(latents_mean=None)
    with pytest.raises(ValueError, match="has neither scaling_factor nor latents_mean"):
        normalise(pipe.vae, torch.zeros(1, 4, 1, 2, 2))


def test_rows_of_a_batch():
    assert batch_rows(1, 8, 8) == 64 and batch_rows(1, 256, 256) == 16
    assert batch_rows(1, 1024, 1024) == 1 and batch_rows(81, 480, 832) == 1
