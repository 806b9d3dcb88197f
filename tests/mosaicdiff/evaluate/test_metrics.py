"""Metrics against what is known of them: closed forms, sets that are equal or apart, loops."""

import numpy as np
import pytest
import torch

from mosaicdiff.evaluate.frechet import Moments, frechet_distance, moments
from mosaicdiff.evaluate.inception_score import inception_score
from mosaicdiff.evaluate.pictures import psnr
from mosaicdiff.evaluate.precision_recall import precision_recall


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """Of commuting covariances it is |mu|^2 + sum (s_a - s_b)^2 of standard deviations."""
    a = Moments(np.array([0.0, 1.0]), np.diag([4.0, 9.0]))
    b = Moments(np.array([3.0, 1.0]), np.diag([1.0, 25.0]))
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 4, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(14, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_one_feature():
    a, b = np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]])
    assert frechet_distance(a, b) == pytest.approx(4 + (2**0.5 - 8**0.5) ** 2, rel=1e-12)


def test_frechet_distance_of_samples_nears_that_of_their_gaussians():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(40_000, 3)), 2 * rng.normal(size=(40_000, 3)) + 1
    assert frechet_distance(a, b) == pytest.approx(3 + 3, rel=0.03)


def test_moments_are_those_of_the_rows():
    rows = np.random.default_rng(2).normal(size=(30, 4)).astype(np.float32)
    found = moments(rows)
    assert found.mean.dtype == found.covariance.dtype == np.float64
    assert frechet_distance(found, rows) == pytest.approx(0, abs=1e-12)


def by_hand(real, generated, k):
    """Precision and recall, pair after pair."""

    def inside(points, centres):
        radii = []
        for i, x in enumerate(centres):
            others = [float(np.linalg.norm(x - y)) for j, y in enumerate(centres) if j != i]
            radii.append(sorted(others)[k - 1])
        hits = [
            any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True))
            for p in points
        ]
        return float(np.mean(hits))

    return inside(generated, real), inside(real, generated)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_a_loop(k):
    rng = np.random.default_rng(3)
    real = rng.normal(size=(40, 3))
    generated = 0.5 * rng.normal(size=(25, 3)) + 0.5
    found = precision_recall(torch.tensor(real), torch.tensor(generated), k)
    assert found == by_hand(real, generated, k)
    assert 0 < found[1] < 1


def test_equal_sets_are_covered_and_sets_apart_are_not():
    x = torch.randn(20, 5)
    assert precision_recall(x, x.clone()) == (1.0, 1.0)
    assert precision_recall(x, x + 1000) == (0.0, 0.0)


def test_pictures_that_are_all_the_same_lie_inside_their_own_manifold():
    """Balls of no size hold the very same point, whatever products of large numbers round to."""
    one = (torch.randn(1, 64) * 100 + 1e4).expand(10, 64)
    assert precision_recall(one, one.clone()) == (1.0, 1.0)
    wide = torch.randn(10, 64) * 100 + 1e4
    precision, recall = precision_recall(torch.cat([one, wide]), one.clone())
    assert precision == 1 and recall == pytest.approx(0.5)


def test_what_is_left_out_lowers_recall_and_what_is_added_lowers_precision():
    left, right = torch.randn(50, 2), torch.randn(50, 2) + 100
    both = torch.cat([left, right])
    assert precision_recall(both, left) == (1.0, 0.5)
    assert precision_recall(left, both) == (0.5, 1.0)


def test_precision_and_recall_do_not_depend_on_the_block():
    a, b = torch.randn(53, 4), torch.randn(37, 4)
    assert precision_recall(a, b, block=7) == precision_recall(a, b, block=1000)


@pytest.mark.parametrize(
    "real, generated, k, message",
    [
        ((3, 2), (9, 2), 3, "more rows than neighbours=3, got 3 and 9. Take more pictures"),
        ((9, 2), (9, 3), 3, "of one width"),
        ((9, 2), (9, 2), 0, "neighbours must be at least 1, got 0"),
    ],
)
def test_sets_too_small_are_refused(real, generated, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(torch.rand(real), torch.rand(generated), k)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="features must be finite"):
        precision_recall(torch.full((9, 2), torch.nan), torch.rand(9, 2))


def test_inception_score_of_what_says_nothing_is_one_and_of_all_classes_their_number():
    assert inception_score(torch.full((12, 5), 0.2))[0] == pytest.approx(1, abs=1e-6)
    assert inception_score(torch.eye(5).repeat(4, 1))[0] == pytest.approx(5, rel=1e-12)
    same = torch.eye(5)[:1].expand(8, 5)
    assert inception_score(same) == (pytest.approx(1, rel=1e-12), 0.0)


def test_inception_score_is_the_mean_over_parts():
    p = torch.randn(20, 6, dtype=torch.float64).softmax(1)
    expected = []
    for part in p.split(10):
        mean = part.mean(0)
        expected.append(np.exp(float((part * (part / mean).log()).sum(1).mean())))
    mean, deviation = inception_score(p, splits=2)
    assert mean == pytest.approx(np.mean(expected), rel=1e-12)
    assert deviation == pytest.approx(np.std(expected), rel=1e-9)


@pytest.mark.parametrize(
    "p, splits, message",
    [
        (torch.eye(3), 4, "splits must be between 1 and the rows"),
        (torch.ones(3, 3), 1, "add up to 1"),
        (torch.tensor([[1.5, -0.5]]), 1, "must be at least 0"),
    ],
)
def test_what_are_no_probabilities_is_refused(p, splits, message):
    with pytest.raises(ValueError, match=message):
        inception_score(p, splits)


def test_psnr_is_the_mean_of_pictures_in_decibels():
    a = torch.zeros(2, 1, 4, 4)
    b = torch.tensor([0.1, 0.01], dtype=torch.float64).reshape(2, 1, 1, 1).expand(a.shape)
    assert psnr(a, b) == pytest.approx((20 + 40) / 2, rel=1e-9)
    assert psnr(a, a) == float("inf")
    with pytest.raises(ValueError, match="two of one shape"):
        psnr(a, b[:1])
