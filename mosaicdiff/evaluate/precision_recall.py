"""Precision and recall of generated features against real ones, by their nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Rows whose distances to all others are in memory at once.
_BLOCK = 1024


def precision_recall(
    real: torch.Tensor, generated: torch.Tensor, neighbours: int = 3, block: int = _BLOCK
) -> tuple[float, float]:
    """Return the shares of generated pictures that look real, and of real ones that are covered.

    A set's manifold is the union of balls around its points, each as large as the distance to its
    k-th nearest neighbour in the set. Precision is the share of generated features inside the
    real manifold, recall the share of real ones inside the generated manifold. Both depend on how
    many there are: compare at one number.

    Args:
        real: (N, d) features.
        generated: (M, d) features.
        neighbours: k; 3 is the paper's.
        block: rows of distances in memory at once; the result does not depend on it.

    Returns:
        Precision and recall, from 0 to 1; distances are taken in float64.

    Raises:
        ValueError: a set has no more than k rows, widths differ, or a value is not finite.

    Source: Kynkaanniemi et al., "Improved precision and recall metric for assessing generative
    models" (arXiv 1904.06991).
    """
    if neighbours < 1:
        raise ValueError(f"precision_recall: neighbours must be at least 1, got {neighbours}.")
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            "precision_recall: features must be two sets (N, d) of one width, got "
            f"{tuple(real.shape)} and {tuple(generated.shape)}."
        )
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(
            f"precision_recall: each set must have more rows than neighbours={neighbours}, got "
            f"{len(real)} and {len(generated)}. Take more pictures."
        )
    if not (torch.isfinite(real).all() and torch.isfinite(generated).all()):
        raise ValueError("precision_recall: features must be finite, got NaN or infinity.")
    # Distances do not depend on the origin; near it the products below lose least.
    centre = real.double().mean(0)
    real, generated = real.double() - centre, generated.double() - centre
    radii = [_radii(features, neighbours, block) for features in (real, generated)]
    return (
        _share_inside(generated, real, radii[0], block),
        _share_inside(real, generated, radii[1], block),
    )


def _distances(
    rows: torch.Tensor, columns: torch.Tensor, block: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield squared distances (B, M), and what rounding may have added to each, by blocks."""
    norms = columns.square().sum(1)
    rounding = 16 * torch.finfo(torch.float64).eps
    for part in rows.split(block):
        sums = part.square().sum(1)[:, None] + norms
        yield (sums - 2 * part @ columns.T).clamp_min(0), rounding * sums


def _radii(features: torch.Tensor, neighbours: int, block: int) -> torch.Tensor:
    """Return the squared distance of each point to its k-th nearest other one."""
    # The point itself, at distance zero, is the first.
    found = [d.kthvalue(neighbours + 1, 1).values for d, _ in _distances(features, features, block)]
    return torch.cat(found)


def _share_inside(
    points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor, block: int
) -> float:
    """Return the share of points inside a ball around any of the centres."""
    # Equal points are at distance zero but for rounding, and must be inside balls of no size.
    inside = [(d <= radii + slack).any(1) for d, slack in _distances(points, centres, block)]
    return float(torch.cat(inside).double().mean())
