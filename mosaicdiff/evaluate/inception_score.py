"""The Inception score, on any network that gives class probabilities."""

from __future__ import annotations

import torch


def inception_score(probabilities: torch.Tensor, splits: int = 1) -> tuple[float, float]:
    """Return exp(E[KL(p(y|x) || p(y))]): from 1, no class in sight, to K, each class seen evenly.

    Args:
        probabilities: (N, K), each row adding up to 1.
        splits: parts scored apart, in order, whose mean and deviation are returned. It is 10 in
            the paper, of 50,000 pictures; few pictures a part lower the score.

    Returns:
        Mean and (population) standard deviation over the parts, in float64.

    Raises:
        ValueError: rows are no probabilities, or fewer than parts.

    Source: Salimans et al., "Improved techniques for training GANs" (arXiv 1606.03498).
    """
    if probabilities.ndim != 2 or not 1 <= splits <= len(probabilities):
        raise ValueError(
            f"inception_score: splits must be between 1 and the rows of probabilities (N, K), got "
            f"{splits} for {tuple(probabilities.shape)}."
        )
    p = probabilities.double()
    if not (p >= 0).all() or not torch.allclose(p.sum(1), p.new_ones(()), atol=1e-4):
        raise ValueError(
            "inception_score: probabilities must be at least 0 and add up to 1 in each row. "
            "Give the softmax of the logits."
        )
    scores = torch.stack([_score(part) for part in p.tensor_split(splits)])
    return float(scores.mean()), float(scores.std(correction=0))


def _score(p: torch.Tensor) -> torch.Tensor:
    # xlogy: what is never seen adds nothing.
    entropies = torch.special.xlogy(p, p).sum(1) - torch.special.xlogy(p, p.mean(0)).sum(1)
    return entropies.mean().exp()
