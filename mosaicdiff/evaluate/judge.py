"""Quality on the embedded model: conditional accuracy and a Frechet distance."""

from __future__ import annotations

import torch

from .. import digits
from .frechet import frechet_distance

_CHUNK = 256


class DigitsJudge:
    """Score pictures of digits by the committed classifier against the real data set."""

    def __init__(self) -> None:
        self.classifier = digits.load_classifier()
        self._real, _ = self._judge(digits.load_images()[0])

    def _judge(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            features = torch.cat([self.classifier.features(c) for c in images.split(_CHUNK)])
            return features, self.classifier.out(features).argmax(1)

    def score(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Return `accuracy` (share of pictures read as their label) and `frechet`.

        Args:
            images: (N, 1, 32, 32) in [-1, 1].
            labels: (N,).
        """
        features, read = self._judge(images.float().cpu())
        return {
            "accuracy": float((read == labels.cpu()).double().mean()),
            "frechet": frechet_distance(features.numpy(), self._real.numpy()),
        }
