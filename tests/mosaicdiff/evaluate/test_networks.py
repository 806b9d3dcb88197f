"""Feature networks: the bundled one, and Inception with random weights where its package is."""

import subprocess
import sys

import pytest
import torch

from mosaicdiff import digits
from mosaicdiff.evaluate import frechet_distance, optional
from mosaicdiff.evaluate.inception_score import inception_score
from mosaicdiff.evaluate.networks import DigitsNetwork, extract, feature_network, to_bytes
from mosaicdiff.evaluate.precision_recall import precision_recall


def test_digits_are_read_and_batches_do_not_matter():
    images, labels = digits.load_images()
    network = feature_network("digits")
    found = extract(network, images[:70], batch_size=32)
    whole = extract(network, images[:70], batch_size=70)
    assert found.values.shape == (70, 64) and found.probabilities.shape == (70, 10)
    torch.testing.assert_close(found.values, whole.values)
    assert (found.probabilities.argmax(1) == labels[:70]).double().mean() > 0.95
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(70))


def test_pictures_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="must be .N, 1, 32, 32. for the features of digits"):
        DigitsNetwork()(torch.zeros(2, 3, 32, 32))


def test_bytes_are_rounded_and_grey_becomes_colour():
    grey = torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 2, 2)
    pixels = to_bytes(grey)
    assert pixels.shape == (1, 3, 2, 2) and pixels.dtype == torch.uint8
    assert pixels[0, 2].flatten().tolist() == [0, 128, 255, 255]
    with pytest.raises(ValueError, match=r"must be \(N, 3, H, W\) or grey"):
        to_bytes(torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("name", ["vgg", "digits:x", "inception:"])
def test_unknown_networks_are_refused(name):
    with pytest.raises(ValueError, match="--features must be digits, inception, inception:FILE"):
        feature_network(name)


def test_weights_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must name a file of weights, got .*missing.pth"):
        feature_network(f"inception:{tmp_path / 'missing.pth'}")


def test_a_missing_package_is_named_with_its_cure():
    with pytest.raises(ValueError, match="--thing needs the package no-such-thing.*pip install"):
        optional.optional_module("no_such_thing", "no-such-thing", "--thing")


def test_optional_packages_are_not_imported_unasked():
    code = """
import sys
import mosaicdiff.evaluate, mosaicdiff.cli.judging
from mosaicdiff.evaluate.networks import feature_network
import mosaicdiff.evaluate.scores
feature_network("digits")
asked = ("torch_fidelity", "lpips", "ImageReward", "torchmetrics", "pyiqa")
assert not (found := [m for m in asked if m in sys.modules]), found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights of torch-fidelity's Inception: its own are not to be had here."""
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="needs torch-fidelity",
        exc_type=ImportError,
    )  # fmt: skip

    class Empty(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return None

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    empty = Empty("x", ["2048"], feature_extractor_weights_path=str(path))
    for layer in empty.modules():  # so that what goes in still shows at the end
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(empty.state_dict(), path)
    return path


def test_inception_gives_features_and_probabilities(inception_weights):
    network = feature_network(f"inception:{inception_weights}")
    grey = torch.rand(3, 1, 20, 24) * 2 - 1
    found = network(grey)
    assert found.values.shape == (3, 2048) and found.probabilities.shape == (3, 1008)
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(3))
    again = network(grey.expand(-1, 3, -1, -1)[1:])
    torch.testing.assert_close(found.values[1:], again.values, atol=1e-4, rtol=1e-3)
    assert (found.values[0] - found.values[1]).abs().max() > 1e-4


def test_weights_of_something_else_are_refused(inception_weights, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="inception could not be loaded") as caught:
        feature_network(f"inception:{tmp_path / 'other.pth'}")
    assert len(str(caught.value)) < 400  # not every name that is missing


def test_figures_are_those_of_torch_fidelity(inception_weights):
    """The same pictures through its own command: distance, score, precision and recall."""
    fidelity = pytest.importorskip("torch_fidelity", exc_type=ImportError)
    noise = torch.Generator().manual_seed(4)
    a, b = (torch.rand(12, 3, 24, 24, generator=noise) * 2 - 1 for _ in range(2))
    b = torch.nn.functional.avg_pool2d(b, 3, 1, 1) + 0.3
    network = feature_network(f"inception:{inception_weights}")
    one, other = network(a), network(b)
    expected = fidelity.calculate_metrics(
        input1=_Pictures(to_bytes(a)), input2=_Pictures(to_bytes(b)), cuda=False, verbose=False,
        fid=True, isc=True, prc=True, isc_splits=3, prc_neighborhood=3, batch_size=12, cache=False,
        samples_shuffle=False, save_cpu_ram=True, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights),
    )  # fmt: skip
    distance = frechet_distance(one.values.numpy(), other.values.numpy())
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    mean, _ = inception_score(one.probabilities, splits=3)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-4)
    # Its second input is the reference, and precision is of the first.
    found = precision_recall(other.values, one.values)
    assert found == pytest.approx((expected["precision"], expected["recall"]))


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.pixels[index]
