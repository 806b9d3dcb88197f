"""Files of prompts: one in a line, or in a column of a table."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Columns that hold the texts where none is named; the first that is there.
COLUMNS = ("prompt", "caption", "text")
#: A text (or label) and where it stands, for messages.
Row = tuple[str, Any]

_KINDS = (".txt", ".json", ".jsonl", ".csv", ".tsv")


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts, and the column that holds them.

    Args:
        path: see `read_prompt_file`.
        column: of a table; None is the first of `COLUMNS` that is there.
    """

    path: Path
    column: str | None = None

    def __str__(self) -> str:
        return str(self.path)


def check_prompt_file(source: Path | PromptFile) -> None:
    """Refuse a file of prompts that is not there or of another kind, before it is read.

    Raises:
        ValueError: says which.
    """
    path, column = (
        (source.path, source.column) if isinstance(source, PromptFile) else (source, None)
    )
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is none"
        raise ValueError(
            f"prune: prompts must be a list of texts or a file, but {path} is no file: {found}. "
            "A single prompt is a list of one."
        )
    if path.suffix.lower() not in _KINDS:
        raise ValueError(
            f"prune: prompts must be a .txt file with one prompt in a line, or a .json, .jsonl, "
            f".csv or .tsv file with a column of them, got {path}."
        )
    if column is not None and path.suffix.lower() == ".txt":
        raise ValueError(
            f"prune: the column of prompts must be left out with a .txt file, got {column!r} for "
            f"{path}. It has one prompt in a line."
        )


def read_prompt_file(path: Path, column: str | None = None) -> list[Row]:
    """Read prompts, or labels, with the place of each.

    Args:
        path: `.txt` with one in a line (blank lines are skipped); `.json` with a list, or
            `.jsonl` with one in a line, of texts or of objects; `.csv` or `.tsv` with a header.
            In UTF-8.
        column: of objects and tables; None is the first of `COLUMNS` that is there.

    Raises:
        ValueError: there are none, or a row holds none; names the file, the row and the cure.
    """
    check_prompt_file(PromptFile(path, column))
    text = read_utf8(path)
    kind = path.suffix.lower()
    if kind == ".txt":
        lines = enumerate(re.split(r"\r\n|\r|\n", text), start=1)
        rows: list[Row] = [
            (f"line {number} of {path}", line.strip()) for number, line in lines if line.strip()
        ]
        if not rows:
            raise ValueError(
                f"prune: prompts must hold at least one, but {path} has no line that is not blank."
            )
        return rows
    if kind in (".csv", ".tsv"):
        return pick_column(read_table(path, text), path, column)
    values = _read_list(path, text) if kind == ".json" else _read_lines(path, text)
    if not values:
        raise ValueError(f"prune: prompts must hold at least one, but {path} holds none.")
    if all(isinstance(value, Mapping) for _, value in values):
        return pick_column(values, path, column)
    for place, value in values:
        if isinstance(value, Mapping):
            raise ValueError(
                f"prune: prompts must all be texts or all be objects, got both ({place})."
            )
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise ValueError(
                f"prune: prompts must be texts, or objects with a column of them, got {value!r} "
                f"({place})."
            )
    if column is not None:
        raise ValueError(
            f"prune: the column of prompts must be left out for {path}, which lists texts, got "
            f"{column!r}."
        )
    return values


def pick_column(
    rows: Sequence[tuple[str, Mapping[str, Any]]], path: Path, column: str | None
) -> list[Row]:
    """Take one column of a table.

    Raises:
        ValueError: it is not there, or empty in a row.
    """
    first = rows[0][1]
    name = column or next((known for known in COLUMNS if known in first), None)
    if name is None:
        raise ValueError(
            f"prune: the column of prompts must be named where none is called "
            f"{', '.join(COLUMNS)}, got {', '.join(map(str, first))} in {path}. Name one "
            "(--prompt-column)."
        )
    found = []
    for place, row in rows:
        value = row.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            held = "no such column" if name not in row else "an empty one"
            raise ValueError(
                f"prune: prompts must stand in column {name!r} of every row, got {held} ({place}; "
                f"columns {', '.join(map(str, row))}). Fill it in, or leave the row out."
            )
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise ValueError(f"prune: prompts must be texts, got {value!r} ({place}).")
        found.append((place, value.strip() if isinstance(value, str) else value))
    return found


def read_table(path: Path, text: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Read a `.csv`, `.tsv` or `.jsonl` table: rows as dicts, each with its place.

    Raises:
        ValueError: it has no rows, or one that is cut short or too long.
    """
    text = read_utf8(path) if text is None else text
    if path.suffix.lower() == ".jsonl":
        rows = _read_lines(path, text)
        for place, value in rows:
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"calibration: rows must be JSON objects, got {value!r} ({place})."
                )
        found = [(place, dict(value)) for place, value in rows]
    else:
        reader = csv.DictReader(
            io.StringIO(text), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
        )
        found = []
        try:
            for row in reader:
                place = f"line {reader.line_num} of {path}"
                if None in row or None in row.values():
                    count = len(reader.fieldnames or ())
                    raise ValueError(
                        f"prune: rows must have as many values as the header has columns, "
                        f"{count}, got another number ({place}). Quote texts that hold commas."
                    )
                found.append((place, dict(row)))
        except csv.Error as error:
            raise ValueError(
                f"prune: {path} must be a table, but the row after line {reader.line_num} is none: "
                f"{error}."
            ) from None
    if not found:
        raise ValueError(f"prune: prompts must hold at least one, but {path} has no rows.")
    return found


def read_utf8(path: Path) -> str:
    """Read a text file.

    Raises:
        ValueError: it is not UTF-8; names the byte and its line.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"prune: prompts must be text in UTF-8, got byte 0x{data[error.start]:02x} at byte "
            f"{error.start} (line {line}) of {path}. Save it as UTF-8."
        ) from None


def _read_list(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"prune: prompts must be JSON, but {path} is not: {error}.") from None
    if not isinstance(values, list):
        raise ValueError(
            f"prune: prompts must be a JSON list of texts or objects, got "
            f"{type(values).__name__} in {path}."
        )
    return [(f"entry {number} of {path}", value) for number, value in enumerate(values)]


def _read_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append((f"line {number} of {path}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"prune: every line must be JSON, got {line:.40} (line {number} of {path}): "
                f"{error}."
            ) from None
    return found
