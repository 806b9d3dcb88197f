"""Image files as the tensors that a VAE takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def check_images(paths: Sequence[Path]) -> None:
    """Refuse files that are no images, before any is encoded; only their headers are read.

    Raises:
        ValueError: names the first.
    """
    from PIL import Image, UnidentifiedImageError

    for path in paths:
        try:
            with Image.open(path):
                pass
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(
                f"calibration: {path} could not be read as an image: {error}"
            ) from None


def read_image(path: Path, channels: int, height: int, width: int) -> torch.Tensor:
    """Read an image as (C, H, W) in [-1, 1], scaled and cropped to the centre at a size.

    Args:
        channels: 1 reads it as grey, 3 in colour.

    Raises:
        ValueError: it cannot be read.
    """
    return _read(path, channels, height, width, frames=1)[:, 0]


def read_video(path: Path, channels: int, height: int, width: int, frames: int) -> torch.Tensor:
    """Read the first frames of a moving image (GIF, WebP, APNG) as (C, F, H, W) in [-1, 1].

    Raises:
        ValueError: it cannot be read, or has fewer frames.
    """
    return _read(path, channels, height, width, frames)


def _read(path: Path, channels: int, height: int, width: int, frames: int) -> torch.Tensor:
    from PIL import Image, ImageOps, UnidentifiedImageError

    found: list[torch.Tensor] = []
    try:
        with Image.open(path) as image:
            held = getattr(image, "n_frames", 1)
            if held < frames:
                raise ValueError(
                    f"calibration: {path} must have {frames} frames, got {held}. Ask for fewer "
                    "(--pipeline-option num_frames=1 takes pictures), or give longer ones."
                )
            for number in range(frames):
                if number:
                    image.seek(number)
                upright = ImageOps.exif_transpose(image)
                fitted = ImageOps.fit(
                    upright.convert("L" if channels == 1 else "RGB"),
                    (width, height),
                    Image.Resampling.BICUBIC,
                )
                pixels: Any = np.asarray(fitted, dtype=np.float32)
                found.append(torch.from_numpy(pixels.reshape(height, width, -1).copy()))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"calibration: {path} could not be read as an image: {error}") from None
    return torch.stack(found).permute(3, 0, 1, 2) / 127.5 - 1
