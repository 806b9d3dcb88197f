"""Real pictures to compare with: folders, statistics, features, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from mosaicdiff import digits
from mosaicdiff.evaluate.frechet import moments
from mosaicdiff.evaluate.networks import DigitsNetwork, Features, extract
from mosaicdiff.evaluate.reference import check_reference, load_reference, save_reference

SHAPE = (1, 32, 32)


class Other:
    """A network of another name."""

    name = "other"
    classes = None

    def __call__(self, images):
        return Features(images.flatten(1))


@pytest.fixture(scope="module")
def network():
    return DigitsNetwork()


@pytest.fixture(scope="module")
def images():
    return digits.load_images()[0][:12]


@pytest.fixture
def pixels(images):
    """(N, H, W) uint8."""
    return ((images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()


def test_the_data_of_digits_are_the_default(network):
    found = load_reference(None, network, SHAPE)
    assert found.count == 1797 and found.name == "digits"
    with pytest.raises(ValueError, match="--reference must be given with --features other"):
        check_reference(None, Other())


def test_a_folder_of_pictures_gives_their_features(network, images, pixels, tmp_path):
    (tmp_path / "more").mkdir()
    for number, picture in enumerate(pixels):
        place = tmp_path / ("more" if number % 2 else ".")
        Image.fromarray(picture).save(place / f"{number:02d}.png")
    found = load_reference(str(tmp_path), network, SHAPE)
    expected = moments(extract(network, images).values.numpy())
    assert found.count == 12
    np.testing.assert_allclose(found.moments.mean, expected.mean, atol=0.02)


def test_pictures_in_an_array_are_those_of_the_files(network, images, pixels, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=pixels[..., None])
    found = load_reference(str(tmp_path / "x.npz"), network, SHAPE)
    expected = extract(network, images).values
    assert (found.features - expected).abs().max() < 0.1


def test_statistics_give_the_distance_alone(network, tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.ones(64), sigma=np.eye(64), other=np.zeros(3))
    found = load_reference(str(tmp_path / "x.npz"), network, SHAPE)
    assert found.count is None and found.features is None
    assert found.moments.mean.sum() == 64
    with pytest.raises(ValueError, match="holds statistics only"):
        save_reference(tmp_path / "y.npz", found, network)


def test_statistics_beside_pictures_are_of_the_whole_set(network, pixels, tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.ones(64), sigma=np.eye(64), arr_0=pixels[..., None])
    found = load_reference(str(tmp_path / "x.npz"), network, SHAPE)
    assert found.count == 12 and found.moments.mean.sum() == 64


def test_features_are_kept_and_read_again(network, tmp_path):
    first = load_reference(None, network, SHAPE)
    save_reference(tmp_path / "kept.npz", first, network)
    again = load_reference(str(tmp_path / "kept.npz"), network, SHAPE)
    assert torch.equal(first.features, again.features)
    np.testing.assert_array_equal(first.moments.mean, again.moments.mean)
    with pytest.raises(ValueError, match="must hold features of other, got those of digits"):
        check_reference(str(tmp_path / "kept.npz"), Other())
    with pytest.raises(ValueError, match="--save-reference must end in .npz"):
        save_reference(tmp_path / "kept.csv", first, network)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"a": np.zeros(2)}, "must hold mu and sigma, or features, or pictures arr_0, got a in"),
        ({"mu": np.zeros(3), "sigma": np.zeros(3)}, r"must hold mu \(d,\) and sigma \(d, d\)"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"pictures arr_0 \(N, H, W, C\) of uint8"),
    ],
)
def test_files_that_hold_something_else_are_refused(network, tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        check_reference(str(tmp_path / "x.npz"), network)


def test_what_is_no_reference_is_refused(network, tmp_path):
    with pytest.raises(ValueError, match="must be a folder of pictures or a .npz file"):
        check_reference(str(tmp_path / "nothing"), network)
    with pytest.raises(ValueError, match="at least 2 pictures, got 0"):
        check_reference(str(tmp_path), network)
    (tmp_path / "x.npz").write_bytes(b"none")
    with pytest.raises(ValueError, match="x.npz could not be read"):
        check_reference(str(tmp_path / "x.npz"), network)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"none")
    with pytest.raises(ValueError, match="--reference: .*a.png could not be read as an image"):
        check_reference(str(tmp_path), network)
