"""Prune package after package: calibrate, solve, keep, build what the next one is seen through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..distributed import World
from ..groups import Denoiser, leading_parameter
from ..request import Job
from ..runtime import StagedDenoiser
from ..statistics.collect import Collected, Peak, Progress, collect
from .memory import MemoryModel, make_packages
from .state import PackageState, Stored
from .units import Unit

#: Solutions of each stage, by name of the layer or linear.
Solved = list[dict[str, Any]]


class Packages(Protocol):
    """What can be solved in packages: layers (`structured`) or linears (`weights`)."""

    units: list[Unit]

    def solve(self, units: Sequence[Unit], statistics: Collected) -> Solved:
        """Solve some units in every stage."""

    def network(self, base: Denoiser, solutions: Solved) -> StagedDenoiser:
        """Build the staged denoiser of what is solved so far."""

    def pack(self, solution: Any) -> Stored:
        """Part a solution into tensors and numbers."""

    def unpack(self, name: str, stored: Stored, device: torch.device) -> Any:
        """Return a solution; the inverse of `pack`."""


@dataclass(frozen=True)
class Split:
    """The packages of a request, what they are expected to take, and what their sums took."""

    packages: list[list[Unit]]
    model: MemoryModel
    memory: int | None
    peak: Peak = field(default_factory=Peak)

    @property
    def expected_bytes(self) -> int:
        """What the largest package takes beside the model and its activations."""
        return max(self.model.package(package) for package in self.packages)

    def chunks(self, package: Sequence[Unit]) -> list[list[Unit]]:
        """Part a package into runs that can be solved at once in what memory is left.

        Without a budget all go at once: equal layers make one batch.
        """
        if self.memory is None:
            return [list(package)]
        room = self.model.room(package, self.memory)
        runs: list[list[Unit]] = []
        held = 0
        for unit in package:
            if not runs or held + unit.workspace > room:
                runs.append([])
                held = 0
            runs[-1].append(unit)
            held += unit.workspace
        return runs


def split_job(job: Job, units: Sequence[Unit]) -> Split:
    """Split the units of a request as its configuration says.

    Raises:
        ValueError: they do not fit into the memory allowed.
    """
    config = job.config
    model = MemoryModel(
        stages=len(job.frame.division),
        at_once=config.activations == "trajectory",
        together=job.device.type == "cpu",
    )
    packages = make_packages(units, config.packages, config.memory_bytes, model)
    return Split(packages, model, config.memory_bytes)


def solve_packages(
    job: Job,
    kind: Packages,
    split: Split,
    state: PackageState | None,
    tell: Progress,
    seen: Collected | None = None,
) -> Solved:
    """Calibrate and solve every package with those before it pruned.

    Args:
        job: the request.
        kind: that knows how.
        split: of its units.
        state: where each package is kept once solved; those that are there are not solved again.
            The first process alone has it.
        tell: hears how far it is.
        seen: statistics of the first package, where they are there already.

    Returns:
        The solutions of each stage.
    """
    device, world = leading_parameter(job.denoiser).device, World.current()
    solved: Solved = [{} for _ in job.frame.division.stages]
    for p, package in enumerate(split.packages):
        stored = world.from_first(None if state is None else state.load(p))
        if stored is None:
            network = kind.network(job.denoiser, solved) if any(solved) else job.denoiser
            what = "calibrate" if len(split.packages) == 1 else (
                f"package {p + 1} of {len(split.packages)}:"
            )  # fmt: skip
            if seen is None:
                seen = collect_package(job, split, package, network, tell, what)
            found = solve_package(kind.solve, split, package, seen, tell, what)
            seen = None  # freed before the next package's are collected
            found = [_exchanged(row, kind, device) for row in found]
            if state is not None:
                packed = [{n: kind.pack(one) for n, one in row.items()} for row in found]
                state.save(p, packed)
        else:
            found = [
                {name: kind.unpack(name, one, device) for name, one in row.items()}
                for row in stored
            ]
        for row, part in zip(solved, found, strict=True):
            row.update(part)
    return solved


def collect_package(
    job: Job, split: Split, package: Sequence[Unit], network: Denoiser, tell: Progress, what: str
) -> Collected:
    """Collect the statistics of one package along a network; all processes must call this."""
    widths = {name: n for unit in package for name, n in unit.widths.items()}
    return collect(job, network, widths, tell, what, split.peak)


def solve_package(
    solve: Callable[[Sequence[Unit], Collected], Sequence[Mapping[str, Any]]],
    split: Split,
    package: Sequence[Unit],
    statistics: Collected,
    tell: Progress,
    what: str,
) -> Solved:
    """Solve one package by `solve`, in runs of units that fit into memory together.

    Returns:
        What this process solved of each stage: all of it, where it is alone.
    """
    world = World.current()
    runs = split.chunks(package)
    if world.size > 1:  # shares of about equal work, one each
        runs = [[unit] for unit in package]
    found: Solved = [{} for _ in statistics]
    for index, run in enumerate(runs):
        tell(f"{what} solve", index, len(runs))
        if world.mine(index):
            for row, part in zip(found, solve(run, statistics), strict=True):
                row.update(part)
    tell(f"{what} solve", len(runs), len(runs))
    return found


def _exchanged(row: dict[str, Any], kind: Packages, device: torch.device) -> dict[str, Any]:
    """Return the solutions of all processes; tensors travel by way of the CPU."""
    world = World.current()
    if world.size == 1:
        return row
    packed = {}
    for name, solution in row.items():
        tensors, numbers = kind.pack(solution)
        packed[name] = ({part: tensor.cpu() for part, tensor in tensors.items()}, numbers)
    merged = world.merged(packed)
    return {name: kind.unpack(name, one, device) for name, one in merged.items()}
