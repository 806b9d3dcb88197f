"""Rows of measurements in CSV files: one row a measurement, replaced when measured again."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def provenance() -> dict[str, str]:
    """Return where and with what a measurement was made."""
    commit = _git("describe", "--always")
    # The rows themselves change while they are measured: they do not make a commit dirty.
    if commit and _git("status", "--porcelain", "--", ".", ":!benchmarks/results"):
        commit += "-dirty"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a results file; an absent one has no rows."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def upsert_row(path: Path, key: Sequence[str], row: dict[str, Any]) -> None:
    """Put a row in the place of the one with the same key, or at the end."""
    text = {name: _format(value) for name, value in row.items()}
    rows = [old for old in read_rows(path) if any(old.get(name, "") != text[name] for name in key)]
    rows.append(text)
    names = list(dict.fromkeys(name for line in rows for name in line))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _format(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
