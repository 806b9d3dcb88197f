"""Folders of images with captions."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from mosaicdiff.inputs.captions import read_captions
from mosaicdiff.inputs.images import check_images, read_image, read_video


def picture(path, size=(6, 4), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255)).save(path)
    return path


def pairs(folder, column=None):
    return [(str(p.path.relative_to(folder)), p.caption) for p in read_captions(folder, column)]


def test_captions_beside_images(tmp_path):
    for name, text in (("b.png", " a\n dog "), ("a.jpg", "a cat")):
        picture(tmp_path / name).with_suffix(".txt").write_text(text)
    (tmp_path / "notes.md").write_text("no image")
    assert pairs(tmp_path) == [("a.jpg", "a cat"), ("b.png", "a dog")]


@pytest.mark.parametrize(
    "name, content, column",
    [
        ("metadata.csv", "file_name,text\nsub/b.png,a dog\na.png,a cat\n", None),
        ("metadata.csv", "file_name,text,mine\nsub/b.png,x,a dog\na.png,y,a cat\n", "mine"),
        (
            "metadata.jsonl",
            '{"file_name": "sub/b.png", "caption": "a dog"}\n'
            '{"file_name": "a.png", "caption": "a cat"}\n',
            None,
        ),
    ],
)
def test_captions_in_a_table(tmp_path, name, content, column):
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub" / "b.png")
    (tmp_path / "a.txt").write_text("the table wins")
    (tmp_path / name).write_text(content)
    assert pairs(tmp_path, column) == [("sub/b.png", "a dog"), ("a.png", "a cat")]


def test_a_folder_without_captions(tmp_path):
    picture(tmp_path / "a.png")
    assert pairs(tmp_path) == [("a.png", None)]


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "must hold images (.png, .jpg, .jpeg, .bmp, .webp, .gif) with captions, or"),
        ({"a.png": None, "a.txt": "x", "b.png": None}, "b.png in"),
        ({"a.png": None, "a.txt": "  \n"}, "must hold a caption, but it is empty"),
        ({"a.png": None, "a.jpg": None, "a.txt": "x"}, "got a.jpg and a.png for one caption"),
        ({"a.png": None, "metadata.csv": "text\nx\n"}, "in column 'file_name', got text (line 2"),
        (
            {"a.png": None, "metadata.csv": "file_name,text\nb.png,x\n"},
            "file of the folder, got 'b.p",
        ),
        ({"a.md": "", "metadata.csv": "file_name,text\na.md,x\n"}, "must be an image, got 'a.md'"),
        ({"metadata.jsonl": "[1]\n"}, "rows must be JSON objects, got [1] (line 1 of"),
        ({"metadata.csv": "a", "metadata.jsonl": ""}, "must hold one table of captions"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, files, message):
    for name, content in files.items():
        if content is None:
            picture(tmp_path / name)
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_captions(tmp_path)


def test_images_are_scaled_and_cropped_to_the_centre(tmp_path):
    path = tmp_path / "a.png"
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255  # the middle third
    Image.fromarray(pixels).save(path)
    assert torch.equal(read_image(path, 3, 8, 8), torch.ones(3, 8, 8))
    assert read_image(path, 1, 4, 12).shape == (1, 4, 12)
    wide = read_image(path, 3, 8, 24)
    assert (wide[:, :, 0] == -1).all() and (wide[:, :, 12] == 1).all()


def test_frames_are_read_of_what_moves(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (0, 255, 0)]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    video = read_video(path, 3, 4, 4, frames=2)
    assert video.shape == (3, 2, 4, 4)
    assert (video[:, 0] == -1).all() and (video[:, 1] == 1).all()
    with pytest.raises(ValueError, match=r"a\.gif must have 5 frames, got 3"):
        read_video(path, 3, 4, 4, frames=5)


def test_files_that_are_no_images_are_refused_before_any_is_read(tmp_path):
    good, bad = picture(tmp_path / "a.png"), tmp_path / "b.png"
    bad.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png could not be read as an image"):
        check_images([good, bad])
    with pytest.raises(ValueError, match=r"b\.png could not be read as an image"):
        read_image(bad, 3, 4, 4)
