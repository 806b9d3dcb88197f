"""Figures of merit of pictures, taken batch by batch, so that not all have to be kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .evaluation import Metric
from .frechet import frechet_distance
from .inception_score import inception_score
from .networks import FeatureNetwork, Features, join
from .pictures import psnr, ssim
from .precision_recall import precision_recall
from .reference import Reference
from .scores import Lpips, PromptScore

_PAIRED = (
    Metric("mse_to_dense", "squared error to dense", "lower", "dense"),
    Metric("psnr", "PSNR to dense, dB", "higher", "dense"),
    Metric("ssim", "SSIM to dense", "higher", "dense"),
)


@dataclass(frozen=True)
class Judges:
    """Who judges the pictures.

    Args:
        network: of the features, or None for what is taken in pixels alone.
        reference: real pictures in its features, given their shape (C, H, W); None without.
        prompt_scores: how well a picture shows its prompt.
        lpips: distance to the dense pictures.
        neighbours: k of precision and recall.
        splits: parts of the Inception score.
    """

    network: FeatureNetwork | None = None
    reference: Callable[[tuple[int, int, int]], Reference] | None = None
    prompt_scores: tuple[PromptScore, ...] = ()
    lpips: Lpips | None = None
    neighbours: int = 3
    splits: int = 1

    def __post_init__(self) -> None:
        if (self.network is None) != (self.reference is None):
            raise ValueError(
                "Judges: network and reference must be given together, got one of them. Features "
                "are compared with those of real pictures."
            )
        if self.neighbours < 1 or self.splits < 1:
            raise ValueError(
                f"Judges: neighbours and splits must be at least 1, got {self.neighbours} and "
                f"{self.splits}."
            )

    def least_images(self) -> int:
        """Return how many pictures it takes at least."""
        return 1 if self.network is None else max(self.neighbours + 1, self.splits, 2)


@dataclass
class Tally:
    """What has been seen of one model at one guidance scale.

    Args:
        judges: who judges.
        reads_labels: whether conditions are labels that the network knows.
    """

    judges: Judges
    reads_labels: bool = False
    _features: list[Features] = field(default_factory=list)
    _sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _count: int = 0
    _labels: list[int] = field(default_factory=list)

    def add(
        self,
        images: torch.Tensor,
        conditions: Sequence[int] | Sequence[str],
        dense: torch.Tensor | None,
    ) -> None:
        """Judge pictures (N, C, H, W), or videos (N, F, C, H, W), in [-1, 1].

        Args:
            images: of the model.
            conditions: one each.
            dense: what the dense model made of the same; None where these are they.
        """
        frames = images.shape[1] if images.ndim == 5 else 1
        pictures = images.flatten(0, 1) if images.ndim == 5 else images
        count = len(images)
        self._count += count
        if self.judges.network is not None:
            self._features.append(self.judges.network(pictures))
            if self.reads_labels:
                self._labels += [int(c) for c in conditions for _ in range(frames)]
        for score in self.judges.prompt_scores:
            texts = [str(c) for c in conditions for _ in range(frames)]
            self._sums[score.metric.name] += count * score(pictures, texts)
        if dense is not None:
            others = dense.flatten(0, 1) if dense.ndim == 5 else dense
            error = (pictures - others).double().square().mean()
            self._sums["mse_to_dense"] += count * float(error)
            a, b = pictures / 2 + 0.5, others / 2 + 0.5
            self._sums["psnr"] += count * psnr(a, b)
            self._sums["ssim"] += count * ssim(a, b)
            if self.judges.lpips is not None:
                self._sums["lpips"] += count * self.judges.lpips(pictures, others)

    @property
    def features(self) -> Features | None:
        """Features of all that was added; None without a network."""
        return join(self._features) if self._features else None

    def record(self) -> dict[str, Any]:
        """Return all but the features, as JSON holds it."""
        return {"sums": dict(self._sums), "count": self._count, "labels": self._labels}

    def restore(self, record: Mapping[str, Any], features: Features | None) -> None:
        """Go on from what `record` and `features` gave."""
        self._sums.update(record["sums"])
        self._count, self._labels = record["count"], list(record["labels"])
        self._features = [] if features is None else [features]

    def metrics(self, reference: Reference | None) -> dict[str, float]:
        """Return the figures of all that was added."""
        found: dict[str, float] = {}
        features = self.features
        if reference is not None and features is not None:
            found["frechet"] = frechet_distance(features.values.numpy(), reference.moments)
            if reference.features is not None:
                found["precision"], found["recall"] = precision_recall(
                    reference.features, features.values, self.judges.neighbours
                )
            if features.probabilities is not None:
                score, _ = inception_score(features.probabilities, self.judges.splits)
                found["inception_score"] = score
                if self.reads_labels:
                    read = features.probabilities.argmax(1) == torch.tensor(self._labels)
                    found["accuracy"] = float(read.double().mean())
        return found | {name: total / self._count for name, total in self._sums.items()}


def known_metrics(
    judges: Judges, reference: Reference | None, rows: Sequence[dict[str, float]]
) -> tuple[Metric, ...]:
    """Return what is known of the figures that rows hold, in the order to show them."""
    network = None if judges.network is None else judges.network.name
    every = (
        Metric("frechet", "Frechet distance", "lower", "reference", network),
        Metric("precision", "precision", "higher", "reference", network, True),
        Metric("recall", "recall", "higher", "reference", network, True),
        Metric("inception_score", "Inception score", "higher", "itself", network),
        Metric("accuracy", "conditional accuracy", "higher", "condition", network, True),
        *(score.metric for score in judges.prompt_scores),
        *_PAIRED,
        *(() if judges.lpips is None else (judges.lpips.metric,)),
    )
    return tuple(metric for metric in every if any(metric.name in row for row in rows))
