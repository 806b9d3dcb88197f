import numpy as np
import pytest
import torch

from mosaicdiff.config import PruneConfig
from mosaicdiff.evaluate import frechet_distance, measure_latency, sample_images
from mosaicdiff.evaluate.configurations import random_denoiser, random_staged

from .conftest import linear_scheduler, tiny_denoiser


def test_frechet_distance_equals_the_matrix_square_root():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    a = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(150, 6)) @ rng.normal(size=(6, 6)) + 0.3
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    gap = a.mean(0) - b.mean(0)
    expected = gap @ gap + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "a, b, message",
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least 2 rows"),
        (np.zeros((5, 2)), np.zeros((5, 3)), "one width"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "must be finite"),
    ],
)
def test_bad_features_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_no_labels_are_refused(pipe):
    with pytest.raises(ValueError, match="at least one picture"):
        sample_images(pipe, [])


def test_latency_weighs_stages_by_their_steps():
    from mosaicdiff.pipeline import cut

    dense = tiny_denoiser()
    staged = cut(dense, PruneConfig(sparsity=0.4, allocation="score"), scheduler=linear_scheduler())
    report = measure_latency(dense, staged, repeats=3)
    assert sum(stage.steps for stage in report.stages) == report.dense.steps == 50
    mean = sum(s.steps * s.macs_with_attention for s in report.stages) / 50
    assert report.macs_ratio == pytest.approx(report.dense.macs_with_attention / mean)
    assert report.efficiency == pytest.approx(report.speedup / report.macs_ratio)
    assert all(0 < s.p20 <= s.milliseconds <= s.p80 for s in report.stages)


def test_named_configurations():
    with pytest.raises(ValueError, match="name must be one of dit-xl-2, dit-b-4"):
        random_denoiser("dit-z", torch.device("cpu"), torch.float32)
    dense = random_denoiser("dit-b-4", torch.device("cpu"), torch.float32)
    staged = random_staged(dense, PruneConfig(sparsity=0.33, round_to=64, allocation="score"))
    x = torch.randn(1, 4, 32, 32)
    for t in (990, 300, 10):
        out = staged(x, torch.tensor([t]), torch.tensor([1])).sample
        assert out.shape == (1, 8, 32, 32) and torch.isfinite(out).all()
