"""What calibrating and solving a package takes, and how few packages a budget allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .units import Unit, split


@dataclass(frozen=True)
class MemoryModel:
    """Count the bytes of a package beside the model and its activations.

    Args:
        stages: of the trajectory.
        at_once: whether all stages are summed at once, as along sampled trajectories, where a
            batch can be undone besides: the sums before it are kept in main memory.
        together: whether main memory is the memory that is meant (on a CPU); statistics wait
            there, packed, to be solved.
    """

    stages: int
    at_once: bool
    together: bool

    def accumulators(self, units: Sequence[Unit]) -> int:
        """Return the bytes of the sums while they grow."""
        widths = [n for unit in units for n in unit.widths.values()]
        one = sum(4 * n * (n + 3) for n in widths)
        if not self.at_once:
            return one
        return self.stages * one * (2 if self.together else 1)

    def package(self, units: Sequence[Unit]) -> int:
        """Return the most that a package takes at any time."""
        packed = sum(_packed(n) for unit in units for n in unit.widths.values())
        waiting = packed * self.stages if self.together else 0
        growing = 0 if self.at_once or not self.together else packed * (self.stages - 1)
        solving = waiting + max(unit.workspace for unit in units)
        return max(self.accumulators(units) + growing, solving)

    def room(self, units: Sequence[Unit], memory: int) -> int:
        """Return what is left for solving beside the statistics of a package."""
        packed = sum(_packed(n) for unit in units for n in unit.widths.values())
        return memory - (packed * self.stages if self.together else 0)


def _packed(n: int) -> int:
    even = n + n % 2
    return 4 * ((even + 1) * (even // 2) + n)


def make_packages(
    units: Sequence[Unit], packages: int | str, memory: int | None, model: MemoryModel
) -> list[list[Unit]]:
    """Split into packages as asked, within the memory that is allowed.

    Args:
        packages: how many, or `auto`: the fewest that fit.
        memory: bytes; None is no limit.

    Raises:
        ValueError: they do not fit; the message says what would.
    """
    if memory is None:
        return split(units, int(packages))
    least = max(model.package([unit]) for unit in units)
    if least > memory:
        raise ValueError(
            f"prune: memory must be at least {_gib(least)} for the widest layer alone, got "
            f"{_gib(memory)}. Allow that, or leave the layer whole (exclude), or use fewer stages."
        )
    fewest = next(
        count
        for count in range(1, len(units) + 1)
        if max(model.package(part) for part in split(units, count)) <= memory
    )
    if packages == "auto":
        return split(units, fewest)
    parts = split(units, int(packages))
    largest = max(model.package(part) for part in parts)
    if largest > memory:
        raise ValueError(
            f"prune: packages must be at least {fewest} to fit into {_gib(memory)}, got "
            f"{packages}, of which the largest takes {_gib(largest)}. Use packages='auto'."
        )
    return parts


def _gib(count: int) -> str:
    """Format bytes as a budget is given: rounded up, so that the figure itself would do."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{-(-count * 100 // size) / 100:.2f}{unit}"
    return f"{count}B"
