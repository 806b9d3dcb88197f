"""Of which tensors of a checkpoint each tensor of a pruned single file is made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..groups import PrunableLayer
from .layout import Layout, Run
from .plan import PREFIX

#: Stored names of what all stages share begin with one of these.
_COMMON = ("shared.", "union.")


@dataclass(frozen=True)
class Part:
    """Indices start..start+length-1 of a tensor of the checkpoint, along an axis."""

    stored: str
    start: int
    length: int


@dataclass(frozen=True)
class Assembly:
    """Parts that make a tensor of the file, one behind the other along an axis."""

    axis: int
    parts: tuple[Part, ...]

    def join(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Make the tensor of the file."""
        cut = [tensors[p.stored].narrow(self.axis, p.start, p.length) for p in self.parts]
        return cut[0] if len(cut) == 1 else torch.cat(cut, self.axis)

    def to_json(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Write it for JSON: a name, parts along the rows, or both axis and parts."""
        only = self.parts[0]
        if len(self.parts) == 1 and only.length == _length(tensors[only.stored], self.axis):
            return only.stored
        parts = [[part.stored, part.start, part.length] for part in self.parts]
        return parts if self.axis == 0 else {"axis": self.axis, "parts": parts}


@dataclass(frozen=True)
class Slot:
    """A run of a dense parameter, and where what is left of it is in a stored tensor.

    Args:
        axis: that it is a run along.
        start: in the dense parameter.
        length: in the dense parameter.
        number: of this run among those of the stored tensor, which are all cut the same.
        runs: of the stored tensor.
    """

    axis: int
    start: int
    length: int
    number: int = 0
    runs: int = 1


#: For each parameter, its slots by the stored piece's name.
Slots = dict[str, dict[str, tuple[Slot, ...]]]


def slots_of(layers: Iterable[PrunableLayer], layout: Layout) -> Slots:
    """Find where the pieces of layers, and all other parameters, lie in the dense parameters."""
    rows = _dense_rows(layout)
    slots: Slots = {name: {name: (Slot(0, 0, count),)} for name, count in rows.items()}
    split: set[str] = set()
    for layer in layers:
        for piece in layer.pieces:
            if piece.parameter not in rows or piece.axis is None:
                continue
            runs = len(piece.starts)
            if piece.partial:
                if piece.parameter not in split:
                    split.add(piece.parameter)
                    slots[piece.parameter] = {}
                length = layer.columns_of_groups
            elif piece.axis == 0:
                length = rows[piece.parameter] // runs
            else:
                continue  # columns that are all one layer's: the rows are whole
            slots[piece.parameter][piece.name] = tuple(
                Slot(piece.axis, start, length, number, runs)
                for number, start in enumerate(piece.starts)
            )
    return slots


def arrange(
    layout: Layout, slots: Slots, tensors: Mapping[str, torch.Tensor]
) -> dict[str, Assembly]:
    """Say what each tensor of the file is made of.

    A tensor of the file is parted where the stages share some of what lies in it and have others
    of their own: each part holds its rows (or columns) in the file's order.

    Args:
        layout: of the dense file.
        slots: of the dense parameters.
        tensors: of the checkpoint, without kept groups.

    Raises:
        ValueError: rows were cut from a run that the file does not hold in one.
    """
    spaces: dict[str, dict[str, str]] = defaultdict(dict)
    found: dict[str, Assembly] = {}
    for stored, tensor in tensors.items():
        prefix, piece = _space(stored)
        if prefix == PREFIX:
            found[PREFIX + stored] = Assembly(0, (Part(stored, 0, len(tensor)),))
        else:
            spaces[prefix][piece] = stored
    for prefix, held in spaces.items():
        for name, runs in layout.items():
            made_of = _assemble(name, runs, slots, held, tensors)
            if made_of is not None:
                found[prefix + name] = made_of
    return found


def dense_name(name: str) -> str:
    """Return the name in the dense file of a tensor that may be one stage's."""
    if name.startswith(f"{PREFIX}stage."):
        return name.removeprefix(f"{PREFIX}stage.").split(".", 1)[1]
    return name


def _space(stored: str) -> tuple[str, str]:
    """Return the prefix of a stored tensor's name in the file, and the piece it is."""
    for common in _COMMON:
        if stored.startswith(common):
            return "", stored.removeprefix(common)
    if stored.startswith("stage."):
        _, stage, piece = stored.split(".", 2)
        return f"{PREFIX}stage.{stage}.", piece
    return PREFIX, stored


def _dense_rows(layout: Layout) -> dict[str, int]:
    rows: dict[str, int] = defaultdict(int)
    for runs in layout.values():
        for run in runs:
            rows[run.parameter] += run.rows
    return rows


def _assemble(
    name: str,
    runs: tuple[Run, ...],
    slots: Slots,
    held: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor],
) -> Assembly | None:
    parts: list[Part] = []
    axis = 0
    for run in runs:
        pieces = slots[run.parameter]
        here = [(slot, held[piece]) for piece, of in pieces.items() if piece in held for slot in of]
        for slot, stored in sorted(here, key=lambda pair: pair[0].start):
            if slot.axis != 0 and len(runs) > 1:
                raise ValueError(
                    f"single file: {run.parameter} must be {name} alone to lose columns of several "
                    "layers, but it is a part of it. Save it as a folder with save_pretrained."
                )
            axis = slot.axis
            part = _part(name, run, slot, stored, tensors[stored])
            if part is not None:
                parts.append(part)
    return Assembly(axis, _joined(parts)) if parts else None


def _part(name: str, run: Run, slot: Slot, stored: str, tensor: torch.Tensor) -> Part | None:
    """Find what of a slot is in a run of a tensor of the file.

    Raises:
        ValueError: the slot was cut, and only a part of it is in the run.
    """
    left = _length(tensor, slot.axis) // slot.runs
    begin = slot.number * left
    if slot.axis != 0:
        return Part(stored, begin, left)
    first, last = max(run.start, slot.start), min(run.start + run.rows, slot.start + slot.length)
    if first >= last:
        return None
    if left == slot.length:
        return Part(stored, begin + first - slot.start, last - first)
    if last - first == slot.length:
        return Part(stored, begin, left)
    raise ValueError(
        f"single file: {run.parameter} must lie in one piece and in order in {name} to lose rows, "
        "but it does not. Save it as a folder with save_pretrained."
    )


def _joined(parts: list[Part]) -> tuple[Part, ...]:
    """Join parts that adjoin in one stored tensor."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if last and last.stored == part.stored and last.start + last.length == part.start:
            found[-1] = Part(last.stored, last.start, last.length + part.length)
        else:
            found.append(part)
    return tuple(found)


def _length(tensor: torch.Tensor, axis: int) -> int:
    return tensor.shape[axis] if tensor.ndim else 1
