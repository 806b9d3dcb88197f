"""Files of clean latents with their conditions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ..adapters import Adapter

#: Kinds of files; tensors of the second are mapped into memory, not read.
LATENTS = (".npz", ".safetensors")


def latent_files(folder: Path) -> list[Path]:
    """List the files of latents of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in LATENTS)


def read_latents(
    path: Path, adapter: Adapter, needed: Sequence[str], texts: bool = False
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Read latents with their conditions.

    Args:
        path: `.safetensors`, which is mapped into memory, or `.npz`, which is read whole.
        adapter: of the denoiser; it says what the conditions are called. A null condition is
            `negative_<name>`. Null conditions and those of a call have one row, or as many as
            there are latents.
        needed: names of the conditions that must be there.
        texts: whether the conditions come from texts instead: then the file must hold none.

    Returns:
        Latents, and conditions by argument.

    Raises:
        ValueError: the file cannot be read, lacks something, or holds something of a wrong kind.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                held = {key: torch.from_numpy(archive[key]) for key in archive.files}
        else:
            held = load_file(path)
    except Exception as error:
        raise ValueError(f"calibration: {path} could not be read: {error}") from None
    needed = ["latents", *(() if texts else needed)]
    if not set(needed) <= set(held):
        names = " and ".join(f"{name!r}" for name in needed)
        raise ValueError(f"calibration: {path} must hold {names}, got {sorted(held)}.")
    latents, inputs = held["latents"], {}
    for condition in adapter.conditions:
        for name, argument in (
            (condition.file_name, condition.name),
            (condition.negative, condition.negative),
        ):
            if name not in held:
                continue
            value = held[name]
            if condition.whole_numbers:
                if value.is_floating_point():
                    raise ValueError(
                        f"calibration: {name} in {path} must be whole numbers, got {value.dtype}."
                    )
                value = value.long()
            shared = name == condition.negative or condition.per_call
            if shared and len(value) == 1:
                value = value.expand(len(latents), *value.shape[1:])
            inputs[argument] = value
    if texts and inputs:
        raise ValueError(
            "calibration: prompts must be left out where the latents have conditions, as in "
            f"{path} ({', '.join(inputs)}). Leave out one of them."
        )
    return latents, inputs
