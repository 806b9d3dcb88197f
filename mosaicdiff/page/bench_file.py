"""Read what `mosaicdiff bench --json` printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..evaluate.bench import BenchRow
from ..evaluate.spent import TimeSpent
from .data import Bench

_MACHINE = ("device", "dtype", "threads", "repeats")


def read_bench(path: Path) -> Bench:
    """Read a benchmark from its file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"report: --bench must be a file, but there is none at {path}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"report: --bench must be JSON, got {path}: {error}.") from None
    try:
        return bench_from_dict(values)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"report: --bench must hold what `mosaicdiff bench --json` prints, got {path}, where "
            f"this is missing or odd: {error}. Run it again."
        ) from None


def bench_from_dict(values: Mapping[str, Any]) -> Bench:
    """Build a benchmark from what `BenchReport.to_dict` gave; more than is shown may be there.

    Raises:
        KeyError: something is missing.
        TypeError: something is of another kind.
    """
    machine = {name: str(values[name]) for name in _MACHINE}
    machine |= {name: str(version) for name, version in values["versions"].items()}
    rows = tuple(
        BenchRow(**{f.name: row[f.name] for f in fields(BenchRow)}) for row in values["rows"]
    )
    if not rows:
        raise KeyError("rows")
    spent = tuple(
        (
            str(one["mode"]),
            str(one["network"]),
            TimeSpent(**{f.name: float(one[f.name]) for f in fields(TimeSpent)}),
        )
        for one in values["time"]
    )
    return Bench(str(values["model"]), machine, rows, spent)
