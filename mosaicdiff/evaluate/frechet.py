"""The Frechet distance between two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Return mean and covariance (over N - 1) of features (N, d), in float64.

    Raises:
        ValueError: there are fewer than two rows, or a value is not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"frechet_distance: features must be at least 2 rows (N, d), got {features.shape}."
        )
    if not np.isfinite(features).all():
        raise ValueError("frechet_distance: features must be finite, got NaN or infinity.")
    return Moments(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(a: np.ndarray | Moments, b: np.ndarray | Moments) -> float:
    """Return |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) in float64.

    Args:
        a: (N, d) features, or their moments.
        b: (M, d) features, or their moments.

    Raises:
        ValueError: a set has fewer than two rows, widths differ, or a value is not finite.

    Source: Heusel et al., "GANs trained by a two time-scale update rule" (arXiv 1706.08500).
    """
    one = a if isinstance(a, Moments) else moments(a)
    other = b if isinstance(b, Moments) else moments(b)
    if one.mean.shape != other.mean.shape:
        raise ValueError(
            "frechet_distance: features must be of one width, got "
            f"{len(one.mean)} and {len(other.mean)}."
        )
    # tr (S_a S_b)^(1/2) from the symmetric R S_b R with R = S_a^(1/2): no complex numbers.
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ other.covariance @ root)
    cross = np.sqrt(np.clip(inner, 0, None)).sum()
    gap = one.mean - other.mean
    trace = np.trace(one.covariance) + np.trace(other.covariance)
    return float(gap @ gap + trace - 2 * cross)
