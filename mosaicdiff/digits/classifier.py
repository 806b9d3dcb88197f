"""The judge of the embedded model: a small classifier whose features give a Frechet distance."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .data import CLASSES

WEIGHTS = Path(__file__).parent / "classifier.safetensors"


class DigitsClassifier(nn.Module):
    """Classify 32x32 digits by three convolutions on the image averaged to 16x16.

    Args of the call:
        images: (B, 1, 32, 32) in [-1, 1].

    Returns:
        Logits (B, 10). `features` gives the (B, 64) activations before the last layer.
    """

    def __init__(self, width: int = 24, features: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.hidden = nn.Linear(2 * width * 16, features)
        self.out = nn.Linear(features, CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        x = F.avg_pool2d(images, 2)
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.out(self.features(images))


def load_classifier(path: Path = WEIGHTS) -> DigitsClassifier:
    """Load the committed classifier in float32, ready for inference.

    Raises:
        FileNotFoundError: the weights are missing from the installation.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(
            f"load_classifier: {path} is missing. Reinstall mosaicdiff, or make the file with "
            "`python -m benchmarks.train_digits`."
        )
    classifier = DigitsClassifier()
    classifier.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return classifier.eval().requires_grad_(False)
