"""What pruning in packages needs to go on after it was killed: a folder of files.

`state.json` says what the state belongs to; `plan.json` what each layer gives up, once that is
known; `package-<p>.safetensors` holds what package p was solved to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import write_text

#: Tensors and numbers of one solution, by name.
Stored = tuple[dict[str, torch.Tensor], dict[str, float]]

_FORMAT = 1
#: How each part of the fingerprint is called in a message.
_NAMES = {
    "model": "the model's weights",
    "config": "the configuration",
    "calibration": "the calibration inputs",
    "schedule": "the scheduler",
    "code": "the version of mosaicdiff",
    "packages": "the packages",
}


class PackageState:
    """A folder that holds the packages solved so far.

    Args:
        folder: created if missing.
        fingerprint: all that decides the result, as plain values.

    Raises:
        ValueError: the folder holds a state of something else, or something that is none.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = folder
        wanted = {"format": _FORMAT, **json.loads(json.dumps(fingerprint))}
        file = folder / "state.json"
        if file.is_file():
            _compare(file, wanted)
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"prune: state {folder} must be a folder that pruning in packages wrote, or new, "
                "but it holds something else. Name another."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(wanted, indent=2) + "\n")

    def write_plan(self, plan: Any) -> None:
        """Keep a plan as plain values."""
        write_text(self.folder / "plan.json", json.dumps(plan) + "\n")

    def read_plan(self) -> Any:
        """Return the plan, or None where it is not known yet."""
        file = self.folder / "plan.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def save(self, package: int, solved: Sequence[Mapping[str, Stored]]) -> None:
        """Write a package, whole or not at all: what is stored of each name, for each stage."""
        tensors = {
            # Stages may hold one tensor (a bias that was not refitted): the file wants several.
            f"{k}/{name}/{part}": tensor.detach().cpu().contiguous().clone()
            for k, row in enumerate(solved)
            for name, (parts, _) in row.items()
            for part, tensor in parts.items()
        }
        values = [{name: numbers for name, (_, numbers) in row.items()} for row in solved]
        path = self._file(package)
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata={"mosaicdiff_package": json.dumps(values)})
        partial.replace(path)

    def load(self, package: int) -> list[dict[str, Stored]] | None:
        """Return what `save` was given, its tensors on the CPU, or None where it was not.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._file(package)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                values = json.loads(file.metadata()["mosaicdiff_package"])
                solved: list[dict[str, Stored]] = [
                    {name: ({}, numbers) for name, numbers in row.items()} for row in values
                ]
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    k, name, part = key.split("/")
                    solved[int(k)][name][0][part] = file.get_tensor(key)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"prune: {path} must be as it was written, but could not be read: {error!r}. "
                "Delete it: its package is then solved again."
            ) from None
        return solved

    def _file(self, package: int) -> Path:
        return self.folder / f"package-{package + 1}.safetensors"


def _compare(file: Path, wanted: Mapping[str, Any]) -> None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"prune: state {file} could not be read: {error}. Delete its folder, or name another."
        ) from None
    other = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
    if not other:
        return
    named = [_NAMES.get(key, key) for key in other]
    if "config" in other and isinstance(found.get("config"), dict):
        pairs = wanted["config"].items()
        fields_ = [name for name, value in pairs if found["config"].get(name) != value]
        named[other.index("config")] += f" ({', '.join(fields_)})"
    raise ValueError(
        f"prune: state {file.parent} must be of this request, but {' and '.join(named)} differ. "
        "Prune with what it was begun with, or name another folder."
    )


def begun(folder: Path) -> bool:
    """Tell whether a state holds more than what it belongs to."""
    return any(path.name != "state.json" for path in folder.iterdir())


def code_version() -> str:
    """Return the version of mosaicdiff and a digest of its sources."""
    from .. import __version__

    digest = hashlib.blake2b(digest_size=8)
    root = Path(__file__).parent.parent
    for path in sorted((*root.rglob("*.py"), *(root.parent / "mosaic_kernels").rglob("*.py"))):
        digest.update(path.read_bytes())
    return f"{__version__} ({digest.hexdigest()})"
