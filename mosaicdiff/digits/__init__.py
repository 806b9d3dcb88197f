"""The embedded model: a latent diffusion transformer of handwritten digits.

`model/` is an ordinary diffusers pipeline folder (`DiTPipeline`), `classifier.safetensors`
the judge that gives features and labels. Both are made by `benchmarks/train_digits.py`;
`model/README.md` is the model card.
"""

from pathlib import Path

from .classifier import DigitsClassifier, load_classifier
from .data import CLASSES, IMAGE_SIZE, load_images

#: Folder of the embedded pipeline, loadable by `DiTPipeline.from_pretrained`.
MODEL_FOLDER = Path(__file__).parent / "model"

__all__ = [
    "CLASSES",
    "IMAGE_SIZE",
    "MODEL_FOLDER",
    "DigitsClassifier",
    "load_classifier",
    "load_images",
]
