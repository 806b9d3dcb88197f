"""Folders of images with a caption each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .prompt_files import pick_column, read_table, read_utf8

#: What is read as an image; those that move are videos to a pipeline that draws them.
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
#: Tables that say which file has which caption, as the datasets library has them.
TABLES = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class Captioned:
    """An image file and its caption; None where the folder says none."""

    path: Path
    caption: str | None


def image_files(folder: Path) -> list[Path]:
    """List the images of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)


def read_captions(folder: Path, column: str | None = None) -> list[Captioned]:
    """List the images of a folder with their captions.

    Captions stand in `metadata.csv` or `metadata.jsonl` (a column `file_name`, and one with the
    texts), or beside each image in a `.txt` file of the same stem. A folder may have none at all.

    Args:
        column: of the table; None is the first of `prompt_files.COLUMNS` that is there.

    Raises:
        ValueError: there is no image, a caption is missing or empty, or a file is not there.
    """
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise ValueError(
            f"calibration: {folder} must hold one table of captions, got {' and '.join(TABLES)}. "
            "Remove one."
        )
    if tables:
        return _from_table(folder, tables[0], column)
    images = image_files(folder)
    if not images:
        raise ValueError(
            f"calibration: {folder} must hold images ({', '.join(IMAGES)}) with captions, or "
            ".safetensors or .npz files of latents, but there is neither."
        )
    texts = {path: path.with_suffix(".txt") for path in images}
    missing = [path for path, text in texts.items() if not text.is_file()]
    if len(missing) == len(images):
        return [Captioned(path, None) for path in images]
    if missing:
        raise ValueError(
            f"calibration: {missing[0].name} in {folder} must have a caption as other images "
            f"have, but there is no {texts[missing[0]].name} ({len(missing)} of {len(images)} "
            "lack one). Write it, or move the image away."
        )
    stems: dict[str, Path] = {}
    for path in images:
        if path.stem in stems:
            raise ValueError(
                f"calibration: images in {folder} must have names of their own, got "
                f"{stems[path.stem].name} and {path.name} for one caption. Rename one."
            )
        stems[path.stem] = path
    return [Captioned(path, _caption(text)) for path, text in texts.items()]


def _caption(path: Path) -> str:
    text = " ".join(read_utf8(path).split())
    if not text:
        raise ValueError(f"calibration: {path} must hold a caption, but it is empty.")
    return text


def _from_table(folder: Path, table: Path, column: str | None) -> list[Captioned]:
    rows = read_table(table)
    texts = pick_column(rows, table, column)
    return [
        Captioned(_named(folder, place, row), str(text))
        for (place, row), (_, text) in zip(rows, texts, strict=True)
    ]


def _named(folder: Path, place: str, row: Mapping[str, Any]) -> Path:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"calibration: rows must name their image in column 'file_name', got "
            f"{', '.join(map(str, row))} ({place})."
        )
    path = folder / name
    if path.suffix.lower() not in IMAGES or not path.is_file():
        rule = "an image" if path.is_file() else "a file of the folder"
        raise ValueError(f"calibration: file_name must be {rule}, got {name!r} ({place}).")
    return path
