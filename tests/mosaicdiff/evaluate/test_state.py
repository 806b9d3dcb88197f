"""An evaluation that was killed goes on where it was, or refuses."""

import json

import numpy as np
import pytest
import torch

from mosaicdiff.evaluate import compare

from ..conftest import tiny_denoiser, tiny_pipeline
from .test_compare import pair, pixel_judges, real  # noqa: F401 - fixtures

ASKED = {"num_images": 7, "steps": 3, "batch_size": 2, "guidance_scales": (1.0, 2.0)}


class Killed(Exception):
    pass


def kill_after(pictures):
    """Hear of pictures, and raise when there are so many."""
    heard = []

    def advance(count):
        heard.append(count)
        if sum(heard) >= pictures:
            raise Killed

    return advance


@pytest.fixture
def killed(pair, real, tmp_path):  # noqa: F811
    """A state of two whole batches and a part of the third, of 4 runs."""
    state = tmp_path / "state.npz"
    with pytest.raises(Killed):
        compare(*pair, judges=pixel_judges(real), state=state, advance=kill_after(19), **ASKED)
    return state


def test_it_goes_on_and_finds_the_same(pair, real, killed):  # noqa: F811
    whole = compare(*pair, judges=pixel_judges(real), **ASKED)
    heard = []
    found = compare(*pair, judges=pixel_judges(real), state=killed, advance=heard.append, **ASKED)
    assert heard[0] == 4 * 4 and sum(heard) == 4 * 7  # two batches of two, told at once
    for one, other in zip(whole.rows, found.rows, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-9)
        assert one.best_by == other.best_by
        assert one.macs_with_attention_per_image == other.macs_with_attention_per_image
        assert one.passes_per_image == other.passes_per_image
    for key, images in whole.images.items():
        assert torch.equal(images, found.images[key])
    assert not killed.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "must be of the same evaluation, got .* of other seed. Delete it"),
        ({"num_images": 8}, "of other num_images and conditions"),
        ({"guidance_scales": (2.0, 1.0)}, "of other guidance_scales"),
    ],
)
def test_another_request_is_refused(pair, real, killed, change, message):  # noqa: F811
    before = killed.read_bytes()
    with pytest.raises(ValueError, match=message):
        compare(*pair, judges=pixel_judges(real), state=killed, **{**ASKED, **change})
    assert killed.read_bytes() == before


def test_other_weights_are_refused(pair, real, killed):  # noqa: F811
    other = tiny_pipeline(tiny_denoiser())
    with torch.no_grad():
        other.transformer.proj_out_2.bias.add_(1)
    with pytest.raises(ValueError, match="of other weights"):
        compare(other, pair[1], judges=pixel_judges(real), state=killed, **ASKED)


def test_a_file_of_something_else_is_refused(pair, tmp_path):  # noqa: F811
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros(2))
    with pytest.raises(ValueError, match="must be a file that evaluate wrote, got .*x.npz"):
        compare(*pair, state=path, **ASKED)
    path.write_bytes(b"none")
    with pytest.raises(ValueError, match="must be a file that evaluate wrote"):
        compare(*pair, state=path, **ASKED)
    np.savez(path, record=np.asarray(json.dumps({"format": 0})))
    with pytest.raises(ValueError, match="of other format and models"):
        compare(*pair, state=path, **ASKED)
    for name in ("x.json", "none/x.npz"):
        with pytest.raises(ValueError, match="state must be a .npz in a folder that exists"):
            compare(*pair, state=tmp_path / name, **ASKED)
