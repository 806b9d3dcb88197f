"""The options that say what calibration is given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from ..config import PruneConfig

input_options = (
    click.option(
        "--calibration",
        help="Images with captions (.txt beside each, or metadata.csv or .jsonl), images by class, "
        "or latents with conditions (.safetensors, .npz): a folder or a file; digits needs none.",
    ),
    click.option(
        "--prompts",
        type=click.Path(path_type=Path),
        help="Of trajectory: .txt file with one prompt, label number or class name in a line, or "
        ".json, .jsonl, .csv or .tsv. Of noised: captions of the --calibration images, in the "
        "order of file names.  [default: all classes in turn]",
    ),
    click.option(
        "--prompt-column",
        help="Column of --prompts.  [default: prompt, caption or text]",
    ),
    click.option(
        "--image-size",
        help="Height and width of pictures: 512 or 480x832.  [default: the pipeline's own]",
    ),
    click.option(
        "--no-cache",
        is_flag=True,
        help="Do not keep encoded images and captions (in mosaicdiff/inputs in $XDG_CACHE_HOME "
        "or ~/.cache), nor take them from there.",
    ),
)

batch_option = click.option(
    "--batch-size",
    default=str(PruneConfig().batch_size),
    show_default=True,
    help="Calibration samples at once; auto: as many as memory allows, at most 64.",
)


def parse_count(text: str) -> int | str:
    """Read a number or a word; what word is for the configuration to judge."""
    return int(text) if text.isdecimal() else text


def parse_size(text: str, others: dict[str, Any]) -> dict[str, int]:
    """Read a height and width, or one number for both, as options of a pipeline's call.

    Raises:
        ValueError: it is none, or one of the two is among the other options.
    """
    match = re.fullmatch(r"([1-9][0-9]*)(?:x([1-9][0-9]*))?", text.strip().lower())
    if match is None:
        raise ValueError(f"--image-size must be such as 512 or 480x832, got {text!r}.")
    twice = sorted({"height", "width"} & set(others))
    if twice:
        raise ValueError(
            f"--image-size must be left out with --pipeline-option {twice[0]}, got {text!r}."
        )
    height = int(match.group(1))
    return {"height": height, "width": int(match.group(2) or height)}
