"""Sheets of pictures as PNG, small enough to lie in a page."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from ..evaluate.evaluation import DENSE, PRUNED, Evaluation
from .data import Sheet

#: Pixels of one sheet at most: pictures are shown fewer and then smaller to stay under it.
#: PNG takes about 2 bytes a pixel of a photograph, so that a sheet stays around 3 MB.
_PIXELS = 1_500_000
#: A picture is not made smaller than this on its longer side to show more of them.
_SMALLEST = 192
#: Clear pixels on every side of a picture, so that bright ones do not run together.
_GAP = 1


def picture_sheets(evaluation: Evaluation, pictures: int) -> tuple[Sheet, ...]:
    """Draw the first pictures of both models at every guidance.

    Args:
        evaluation: with its pictures; of videos the middle frame is taken.
        pictures: of each sheet, at most; large ones are fewer.

    Raises:
        ValueError: no picture is asked for.
    """
    if pictures < 1:
        raise ValueError(f"report: pictures must be at least 1, got {pictures}.")
    return tuple(
        make_sheet(evaluation.images[model, scale], model, scale, pictures)
        for scale in evaluation.setting.guidance_scales
        for model in (DENSE, PRUNED)
    )


def make_sheet(images: torch.Tensor, model: str, guidance: float | None, most: int) -> Sheet:
    """Tile pictures (N, C, H, W), or the middle frames of videos (N, F, C, H, W), in [-1, 1]."""
    frame = None
    if images.ndim == 5:
        frame = images.shape[1] // 2
        images = images[:, frame]
    height, width = images.shape[-2:]
    count, (rows, columns) = fitting_count(min(most, len(images)), height, width)
    new_height, new_width = fitting_size(count, height, width)
    shown = (images[:count].float().clamp(-1, 1) + 1) / 2
    if (new_height, new_width) != (height, width):
        shown = functional.interpolate(
            shown, (new_height, new_width), mode="bilinear", antialias=True, align_corners=False
        )
    pixels = (shown.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    if pixels.shape[-1] not in (1, 3):
        raise ValueError(
            f"report: pictures must have 1 or 3 channels, got {pixels.shape[-1]} of {model}."
        )
    cell_height, cell_width = new_height + 2 * _GAP, new_width + 2 * _GAP
    channels = pixels.shape[-1]
    sheet = np.zeros((rows * cell_height, columns * cell_width, channels + 1), np.uint8)
    for index, picture in enumerate(pixels):
        top, left = (index // columns) * cell_height + _GAP, (index % columns) * cell_width + _GAP
        place = sheet[top : top + new_height, left : left + new_width]
        place[..., :channels], place[..., channels] = picture, 255
    buffer = io.BytesIO()
    Image.fromarray(sheet, "LA" if channels == 1 else "RGBA").save(buffer, "PNG", optimize=True)
    shrunk = None if (new_height, new_width) == (height, width) else (width, height)
    return Sheet(
        model, guidance, buffer.getvalue(), columns, count, (cell_width, cell_height), shrunk, frame
    )


def fitting_count(most: int, height: int, width: int) -> tuple[int, tuple[int, int]]:
    """Return how many pictures are shown, and the rows and columns they lie in.

    As many as fit when they are shrunk to the smallest size, in whole rows where there are enough.
    """
    scale = min(1.0, _SMALLEST / max(height, width))
    fit = max(1, int(_PIXELS / (height * scale * width * scale)))
    count = min(most, fit)
    columns = max(1, min(count, round(math.sqrt(count * 4 / 3))))
    if count > columns:
        count -= count % columns
    return count, (-(-count // columns), columns)


def fitting_size(count: int, height: int, width: int) -> tuple[int, int]:
    """Return the height and width of a picture at which so many fit."""
    scale = min(1.0, math.sqrt(_PIXELS / (count * height * width)))
    return max(1, int(height * scale)), max(1, int(width * scale))
