"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: A model's folder holds one of these.
_OURS = ("model_index.json", "config.json")


def check_output_folder(path: Path, overwrite: bool) -> None:
    """Refuse a path that holds something already.

    Raises:
        ValueError: it is a file, or a folder that is not empty and may not be overwritten.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"output: {path} must be a folder, but it is a file.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(
            f"output: {path} must be new or empty, but it holds files. "
            "Choose another folder, or pass --overwrite to replace it."
        )
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise ValueError(f"output: {parent} must be writable, but it is not.")


def check_model_folder(path: Path) -> None:
    """Refuse to replace a folder that holds something, but no model.

    Raises:
        ValueError: it does.
    """
    if path.is_dir() and any(path.iterdir()) and not any((path / n).is_file() for n in _OURS):
        raise ValueError(
            f"output: {path} must be new, empty or a model's folder to be replaced, but it holds "
            "other files. Choose another folder, or delete it yourself."
        )


@contextmanager
def whole_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which takes its place when the block succeeds.

    What stood there goes only after the new folder is complete; on failure nothing changes.
    """
    check_output_folder(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        temporary.chmod(0o777 & ~current_umask())
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def current_umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a file by way of a temporary one, so that readers never see a half."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
