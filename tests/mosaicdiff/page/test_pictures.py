"""Sheets of pictures."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mosaicdiff.page.pictures import (
    _PIXELS,
    fitting_count,
    fitting_size,
    make_sheet,
    picture_sheets,
)


def pixels(sheet) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sheet.png)))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_where_it_belongs(channels):
    images = torch.rand(12, channels, 6, 5) * 2 - 1
    sheet = make_sheet(images, "dense", 1.5, 12)
    assert (sheet.columns, sheet.count, sheet.cell, sheet.shrunk_from) == (4, 12, (7, 8), None)
    found = pixels(sheet)
    assert found.shape == (24, 28, channels + 1)
    expected = ((images[6] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    part = found[8 + 1 : 8 + 7, 14 + 1 : 14 + 6]  # row 1, column 2
    assert np.array_equal(part[..., :channels], expected) and (part[..., channels] == 255).all()
    assert (found[8, :, channels] == 0).all()  # the gap is clear


def test_values_outside_are_clamped():
    sheet = make_sheet(torch.full((1, 1, 4, 4), 7.0), "dense", None, 9)
    assert (pixels(sheet)[1:-1, 1:-1, 0] == 255).all()


def test_of_videos_the_middle_frame():
    videos = torch.zeros(2, 5, 3, 4, 4)
    videos[:, 2] = 1
    sheet = make_sheet(videos, "pruned", None, 9)
    assert sheet.frame == 2 and (pixels(sheet)[1:-1, 1:5, :3] == 255).all()


def test_large_pictures_are_fewer_and_smaller():
    sheet = make_sheet(torch.zeros(60, 3, 512, 768), "dense", 1.0, 60)
    assert sheet.shrunk_from == (768, 512)
    width, height = Image.open(io.BytesIO(sheet.png)).size
    assert width * height < 1.1 * _PIXELS and 12 < sheet.count < 60


@given(st.integers(1, 200), st.integers(1, 3000), st.integers(1, 3000))
def test_sheets_stay_small_and_whole(most, height, width):
    count, (rows, columns) = fitting_count(most, height, width)
    assert 1 <= count <= most and (rows - 1) * columns < count <= rows * columns
    tall, wide = fitting_size(count, height, width)
    assert count * tall * wide <= _PIXELS and tall <= height and wide <= width
    assert tall / height == pytest.approx(wide / width, abs=1.01 / min(height, width))


def test_both_models_at_every_guidance(evaluation):
    sheets = picture_sheets(evaluation, 4)
    assert [(s.model, s.guidance) for s in sheets] == [
        ("dense", 1.0), ("pruned", 1.0), ("dense", 2.0), ("pruned", 2.0)
    ]  # fmt: skip
    assert all(sheet.count == 4 for sheet in sheets)
    assert sheets[0].png != sheets[1].png


def test_what_can_not_be_shown_is_refused(evaluation):
    with pytest.raises(ValueError, match="pictures must be at least 1, got 0"):
        picture_sheets(evaluation, 0)
    odd = {key: torch.zeros(2, 5, 4, 4) for key in evaluation.images}
    with pytest.raises(ValueError, match="pictures must have 1 or 3 channels, got 5 of dense"):
        picture_sheets(replace(evaluation, images=odd), 2)
