"""Structural similarity, against a loop written out, and metrics of another package."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mosaicdiff.evaluate.pictures import decode_latents, picture_metric, ssim


def by_hand(a, b):
    """Return the mean structural similarity, window after window."""
    height, width = a.shape[-2:]
    size = min(11, height - (height + 1) % 2, width - (width + 1) % 2)
    offsets = np.arange(size) - size // 2
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line)
    window /= window.sum()
    values = []
    for x, y in zip(a.reshape(-1, height, width), b.reshape(-1, height, width), strict=True):
        for i in range(height - size + 1):
            for j in range(width - size + 1):
                p, q = x[i : i + size, j : j + size], y[i : i + size, j : j + size]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                both = (window * (p - mp) * (q - mq)).sum()
                values.append(
                    (2 * mp * mq + 1e-4) * (2 * both + 9e-4)
                    / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
                )  # fmt: skip
    return np.mean(values)


@pytest.mark.parametrize("shape", [(2, 3, 14, 17), (1, 1, 8, 8), (2, 1, 5, 30), (1, 2, 11, 11)])
def test_similarity_is_the_mean_over_windows(shape):
    a, b = torch.rand(shape), torch.rand(shape)
    b = 0.6 * a + 0.4 * b
    assert ssim(a, b) == pytest.approx(by_hand(a.double().numpy(), b.double().numpy()), abs=1e-9)


def test_only_equal_pictures_are_wholly_similar():
    a = torch.rand(2, 3, 16, 16)
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-12)
    near = (a + 0.05 * torch.randn_like(a)).clamp(0, 1)
    far = (a + 0.3 * torch.randn_like(a)).clamp(0, 1)
    assert ssim(a, far) < ssim(a, near) < 1
    assert ssim(a, near) == pytest.approx(ssim(near, a), rel=1e-12)


@pytest.mark.parametrize("other", [(1, 1, 8, 9), (1, 8, 8)])
def test_pictures_of_two_shapes_are_refused(other):
    with pytest.raises(ValueError, match="must be two of one shape"):
        ssim(torch.rand(1, 1, 8, 8), torch.rand(other))


def test_decoded_latents_are_pictures_between_0_and_1(pipe):
    pictures = decode_latents(pipe.vae, 10 * torch.randn(3, 2, 8, 8))
    assert pictures.shape == (3, 1, 8, 8) and pictures.dtype == torch.float32
    assert 0 <= pictures.min() < pictures.max() <= 1


class FakeMetric:
    def __init__(self, lower_better):
        self.lower_better = lower_better

    def __call__(self, pictures):
        return pictures.flatten(1).mean(1)


@pytest.fixture
def fake_pyiqa(monkeypatch):
    kinds = {"brisque": "NR", "clipiqa": "NR", "psnr": "FR"}

    def list_models(metric_mode=None, filter="", exclude_filters=""):
        return [name for name, mode in kinds.items() if metric_mode in (None, mode)]

    module = SimpleNamespace(
        list_models=list_models,
        create_metric=lambda name: FakeMetric(lower_better=name == "brisque"),
    )
    monkeypatch.setitem(sys.modules, "pyiqa", module)


def test_a_metric_of_quality_becomes_an_error(fake_pyiqa):
    pictures = torch.tensor([0.2, 0.4]).reshape(2, 1, 1, 1)
    assert picture_metric("brisque")(pictures) == pytest.approx(0.3)
    assert picture_metric("clipiqa")(pictures) == pytest.approx(-0.3)


@pytest.mark.parametrize("name", ["nothing", "psnr"])
def test_a_metric_that_is_unknown_or_needs_a_reference_is_refused(fake_pyiqa, name):
    with pytest.raises(ValueError, match=f"iqa:{name} must name a metric of pyiqa"):
        picture_metric(name)


def test_without_the_package_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(ValueError, match="needs the package pyiqa.*pip install pyiqa"):
        picture_metric("brisque")
