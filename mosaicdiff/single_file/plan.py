"""What a pruned single file says of itself, in the metadata of its header."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

#: Key of the metadata.
KEY = "mosaicdiff"
#: What names that the published layout lacks begin with.
PREFIX = "mosaicdiff."
VERSION = 1


def read_header(path: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, str]]:
    """Return shape and type of each tensor of a `.safetensors`, and its metadata.

    Raises:
        ValueError: there is no such file, or it is none.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(
            f"single file: path must be a .safetensors file, got {path}"
            f"{'' if path.exists() else ', which does not exist'}. Convert pickled checkpoints "
            "(.ckpt, .bin) first."
        )
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            held = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            return held, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"single file: {path} could not be read: {error}.") from None


def read_plan(path: str | Path) -> dict[str, Any]:
    """Read what a pruned single file says of itself; see docs/single-file-format.md.

    Raises:
        ValueError: it is no safetensors file, was not pruned, or is of another version.
    """
    _, metadata = read_header(Path(path))
    if KEY not in metadata:
        raise ValueError(
            f"single file: {path} must have been written by save_single_file, but its metadata "
            f"has no {KEY!r}. Load a dense one with load_single_file_pipeline, or by diffusers."
        )
    plan = json.loads(metadata[KEY])
    if plan.get("version") != VERSION:
        raise ValueError(
            f"single file: version must be {VERSION}, got {plan.get('version')} in {path}. Load it "
            "with the mosaicdiff that wrote it, or prune again with this one."
        )
    return plan


def is_pruned(path: str | Path) -> bool:
    """Say whether a single file was written by `save_single_file`."""
    return KEY in read_header(Path(path))[1]


def pack_kept(kept: torch.Tensor, groups: int) -> dict[str, Any]:
    """Write kept groups as bits, the first in the highest bit of a byte, in base64."""
    bits = np.zeros(groups, dtype=bool)
    bits[kept.cpu().numpy()] = True
    return {"groups": groups, "bits": base64.b64encode(np.packbits(bits).tobytes()).decode()}


def unpack_kept(packed: dict[str, Any]) -> torch.Tensor:
    """Undo `pack_kept`: the kept groups, ascending, int32."""
    held = np.frombuffer(base64.b64decode(packed["bits"]), dtype=np.uint8)
    bits = np.unpackbits(held, count=packed["groups"])
    return torch.from_numpy(bits.nonzero()[0].astype(np.int32))
