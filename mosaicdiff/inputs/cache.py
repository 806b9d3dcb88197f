"""Encoded inputs, kept on disk for the next run."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import whole_folder

_LAYOUT = 1
_INDEX = "index.json"
Batch = tuple[torch.Tensor, dict[str, Any]]


def cache_folder() -> Path:
    """Return where encoded inputs are kept: in $XDG_CACHE_HOME or ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "mosaicdiff" / "inputs"


def cache_key(
    pipe: Any, files: Sequence[Path], texts: Sequence[str], settings: Mapping[str, Any]
) -> str:
    """Name all that encoded inputs depend on.

    The files' bytes, the texts, the settings of the call, every component but denoiser and
    scheduler with its weights, and the versions of the libraries that encode.
    """
    digest = hashlib.blake2b(digest_size=16)
    versions = [version(name) for name in ("torch", "diffusers", "transformers")]
    stated = [_LAYOUT, type(pipe).__name__, versions, list(texts), dict(settings)]
    digest.update(json.dumps(stated, sort_keys=True, default=str).encode())
    for path in files:
        digest.update(_file_digest(path))
    for name, part in sorted(pipe.components.items()):
        if name == "scheduler" or name.startswith(("transformer", "unet")):
            continue
        digest.update(f"{name} {type(part).__name__}".encode())
        if isinstance(part, nn.Module):
            digest.update(repr(getattr(part, "config", None)).encode())
            for key, tensor in sorted(part.state_dict().items()):
                digest.update(f"{key} {tensor.dtype}".encode())
                raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(raw.numpy().data)
        elif hasattr(part, "get_vocab"):
            vocabulary = sorted(part.get_vocab().items())
            digest.update(json.dumps([vocabulary, part.model_max_length]).encode())
    return digest.hexdigest()


def read_cache(folder: Path, key: str) -> list[Batch] | None:
    """Return the batches kept under a key, mapped into memory; None where there are none.

    What is there but not as it was written is told of, and taken for nothing.
    """
    place = folder / key
    if not (place / _INDEX).is_file():
        return None
    try:
        return [_read_part(place, part) for part in _parts(place, key)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"calibration: the encoded inputs kept in {place} are damaged ({error}): they are "
            "made again.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def write_cache(folder: Path, key: str, batches: Iterable[Batch]) -> list[Batch]:
    """Write batches as they come, so that they are never in memory at once, and return them mapped.

    The folder appears when all is written.

    Raises:
        RuntimeError: it cannot be written.
    """
    place = folder / key
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(_unwritable(place, error)) from None
    parts: list[dict[str, Any]] = []
    with whole_folder(place, overwrite=True) as temporary:
        for number, (latents, inputs) in enumerate(batches):
            name = f"{number:05}.safetensors"
            tensors = {
                key: _compact(value) for key, value in {"latents": latents, **inputs}.items()
            }
            try:
                save_file(tensors, temporary / name)
            except OSError as error:
                raise RuntimeError(_unwritable(place, error)) from None
            digest = _file_digest(temporary / name).hex()
            parts.append({"name": name, "rows": len(latents), "digest": digest})
        index = {"layout": _LAYOUT, "key": key, "parts": parts}
        (temporary / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    return [_read_part(place, part) for part in parts]


def _unwritable(place: Path, error: Exception) -> str:
    return (
        f"calibration: encoded inputs could not be kept in {place}: {error}. Point "
        "XDG_CACHE_HOME elsewhere, or keep nothing (--no-cache)."
    )


def _parts(place: Path, key: str) -> list[dict[str, Any]]:
    """Read the index and hold every file to it."""
    index = json.loads((place / _INDEX).read_text(encoding="utf-8"))
    if index["layout"] != _LAYOUT or index["key"] != key or not index["parts"]:
        raise ValueError("its index is another's")
    for part in index["parts"]:
        path = place / part["name"]
        if not path.is_file():
            raise ValueError(f"{part['name']} is missing")
        if _file_digest(path).hex() != part["digest"]:
            raise ValueError(f"{part['name']} is not as it was written")
    return index["parts"]


def _read_part(place: Path, part: Mapping[str, Any]) -> Batch:
    held = load_file(place / part["name"])
    rows = part["rows"]
    whole = {
        name: value.expand(rows, *value.shape[1:]) if len(value) == 1 else value
        for name, value in held.items()
    }
    return whole.pop("latents"), whole


def _compact(value: torch.Tensor) -> torch.Tensor:
    """Keep one row where all are the same."""
    same = len(value) > 1 and bool((value == value[:1]).all())
    return (value[:1] if same else value).contiguous().clone()


def _file_digest(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.digest()
