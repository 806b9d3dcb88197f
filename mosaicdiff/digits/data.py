"""The data set behind the embedded model."""

import torch
import torch.nn.functional as F

CLASSES = 10
IMAGE_SIZE = 32


def load_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Load scikit-learn's handwritten digits, enlarged fourfold.

    Returns:
        Images (1797, 1, 32, 32), float32 in [-1, 1], and labels (1797,), int64.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    Learning Repository, 1998 (CC BY 4.0), the test part, as `sklearn.datasets.load_digits`
    ships it: 8x8 pixels of 0..16.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    enlarged = F.interpolate(pixels, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    return enlarged.clamp(-1, 1), torch.from_numpy(digits.target).long()
