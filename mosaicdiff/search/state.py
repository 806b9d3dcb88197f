"""What a search needs to go on after it was killed, in one JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_text

#: One level for each gene; the sum is the budget, and no mutation changes it.
Genome = tuple[int, ...]

_FORMAT = 1


@dataclass
class State:
    """A search between two batches: all as of the start of the generation, but memo and seconds.

    Args:
        random: state of numpy's bit generator.
        known: genomes of the memo that were evaluated before the generation.
        parents: survivors of the generation before, best first.
        history: least error after each whole generation.
        seconds: spent in all runs.
        memo: error of every genome evaluated, in the order of evaluation.
    """

    random: dict[str, Any]
    known: int
    parents: list[Genome]
    history: list[float]
    seconds: float
    memo: dict[Genome, float]


def save(path: Path, identity: dict[str, Any], state: State) -> None:
    """Write a state, whole or not at all, with what identifies its search."""
    memo = [[list(genome), error] for genome, error in state.memo.items()]
    content = {"format": _FORMAT, **identity, **vars(state), "memo": memo}
    write_text(path, json.dumps(content) + "\n")


def load(path: Path, identity: dict[str, Any]) -> State:
    """Read a state, and refuse one of another search.

    Args:
        path: file to read.
        identity: what decides the result, as given to `save`.

    Raises:
        ValueError: it is no state, or its identity differs.
    """
    cure = "Delete it, or choose another file."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        identity = {"format": _FORMAT, **identity}
        other = [name for name, value in identity.items() if found[name] != value]
        state = State(
            random=found["random"],
            known=int(found["known"]),
            parents=[tuple(genome) for genome in found["parents"]],
            history=[float(error) for error in found["history"]],
            seconds=float(found["seconds"]),
            memo={tuple(genome): float(error) for genome, error in found["memo"]},
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"evolve: state must be a file that evolve wrote, got {path} ({error!r}). {cure}"
        ) from error
    if other:
        raise ValueError(
            f"evolve: state must be of the same search, got {path}, of other "
            f"{' and '.join(other)}. {cure}"
        )
    return state
