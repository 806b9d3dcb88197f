"""What `mosaicdiff bench --json` measured, as tables, and where the time goes as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .data import Page
from .markup import Markup, element
from .tables import data_table


def speed_section(page: Page) -> Markup | None:
    """Return the benchmark's rows; None where there is no benchmark.

    Whatever list of rows the file holds becomes a table, whatever single values become another.
    """
    if page.bench is None:
        return None
    singles = [
        [_title(name), write(value)] for name, value in page.bench.items() if not _nested(value)
    ]
    tables = []
    for name, value in page.bench.items():
        rows = _rows_of(value)
        if rows:
            tables.append(_table(_title(name), rows))
    return element(
        "section",
        element("h2", "Speed of the denoiser alone"),
        element(
            "p",
            "Dense and pruned timed call by call in turn, in the same way of execution. Efficiency "
            "is the speed-up over the ratio of MACs: 1 is what the arithmetic allows.",
            class_="caption",
        ),
        data_table("What was timed", ["", ""], singles, texts=2) if singles else None,
        *tables,
        id="speed",
    )


def write(value: Any) -> str:
    """Write one value of a benchmark: numbers in four figures, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _rows_of(value: Any) -> list[Mapping[str, Any]]:
    """Return the rows that a value is, or none."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [row for row in value if isinstance(row, Mapping)]
    if isinstance(value, Mapping):
        if value and all(isinstance(inner, Mapping) for inner in value.values()):
            return [{"": key} | dict(inner) for key, inner in value.items()]
        return [value]
    return []


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    keys = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if not any(_nested(row.get(key)) for row in rows)
    ]
    texts = [key for key in keys if any(isinstance(row.get(key), str) for row in rows)]
    ordered = [*texts, *(key for key in keys if key not in texts)]
    cells = [[write(row.get(key)) for key in ordered] for row in rows]
    return data_table(title, [_title(key) for key in ordered], cells, texts=max(len(texts), 1))


def _nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple))


def _title(key: str) -> str:
    return key.replace("_", " ")
