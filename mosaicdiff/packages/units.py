"""What is calibrated and solved together, and how that is split into packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mosaic_kernels.prune import elimination_bytes

from ..groups import Denoiser, PrunableLayer, WeightTarget


@dataclass(frozen=True)
class Unit:
    """A layer with its readers, or the linears that are given one input: never separated.

    Args:
        members: indices of the layers, or of the targets.
        widths: input features n of each accumulator, by linear name.
        work: operations of calibrating and solving it, up to a factor that all units share.
        workspace: bytes that solving it takes beside its statistics, at most.
    """

    members: tuple[int, ...]
    widths: Mapping[str, int]
    work: float
    workspace: int


def layer_units(denoiser: Denoiser, layers: Sequence[PrunableLayer]) -> list[Unit]:
    """Make a unit of every layer, in network order."""
    units = []
    for index, layer in enumerate(layers):
        n, readers = layer.columns_of_groups, len(layer.readers)
        weights = [denoiser.get_submodule(reader.module).weight for reader in layer.readers]
        rows, device = max(len(weight) for weight in weights), weights[0].device
        # The statistics twice in float32 with what elimination takes; or, for the fit, H, its
        # kept part and the factor of that in float64.
        eliminate = 2 * 4 * n * n + elimination_bytes(rows, n, layer.width, 4, device)
        fit = 4 * n * n + 8 * (3 * n * n + 2 * rows * n)
        work = readers * (float(n) ** 3 + rows * float(n) ** 2)
        widths = dict.fromkeys(layer.input_names, n)
        units.append(Unit((index,), widths, work, max(readers * eliminate, fit)))
    return units


def target_units(denoiser: Denoiser, targets: Sequence[WeightTarget]) -> list[Unit]:
    """Make a unit of every run of targets that share an input, in network order."""
    units: list[Unit] = []
    runs: dict[str, list[int]] = {}
    for index, target in enumerate(targets):
        runs.setdefault(target.source, []).append(index)
    for source, members in runs.items():
        linears = [denoiser.get_submodule(targets[i].name) for i in members]
        n = linears[0].in_features
        rows = [linear.out_features for linear in linears]
        work = float(n) ** 3 + sum(rows) * float(n) ** 2
        # H, its factor on the way and when done, all float32; weights, mask and errors of one.
        workspace = 4 * 4 * n * n + 16 * max(rows) * n
        units.append(Unit(tuple(members), {source: n}, work, workspace))
    return units


def split(units: Sequence[Unit], count: int) -> list[list[Unit]]:
    """Part the units, in their order, into packages of about equal work.

    Raises:
        ValueError: there are fewer units than packages.
    """
    if not 1 <= count <= len(units):
        raise ValueError(
            f"packages: packages must be at most {len(units)}, one for each layer or group of "
            f"linears that share an input, got {count}."
        )
    done = torch.tensor([unit.work for unit in units], dtype=torch.float64).cumsum(0)
    edges = [0]
    for p in range(1, count):
        first, last = edges[-1] + 1, len(units) - (count - p)
        aim = float(done[-1]) * p / count
        edges.append(min(range(first, last + 1), key=lambda i: abs(float(done[i - 1]) - aim)))
    edges.append(len(units))
    return [list(units[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
