"""Packages of layers that lose heads and neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..allocation.planning import PrunePlan
from ..groups import Denoiser
from ..request import Job
from ..runtime import StagedDenoiser
from ..solving.curves import RemovalCurve
from ..solving.fit import Fitter, Solutions, assemble
from ..solving.solve import FittedReader, LayerSolution
from ..statistics.calibration import Calibration
from ..statistics.collect import Collected
from ..statistics.gather import trace
from .state import Stored
from .units import Unit, layer_units


class LayerPackages:
    """Solve the layers of a plan, some at a time.

    Args:
        job: the request.
        plan: what each layer of each stage gives up.
    """

    def __init__(self, job: Job, plan: PrunePlan) -> None:
        self._job, self.plan = job, plan
        self.units = layer_units(job.denoiser, job.layers)

    def solve(self, units: Sequence[Unit], statistics: Collected) -> Solutions:
        """Choose and refit the groups of some layers in every stage."""
        indices = [i for unit in units for i in unit.members]
        part, measured = traced(self._job, indices, statistics)
        fitter = Fitter(part, measured)
        return [
            {
                part.layers[j].name: fitter.layer(k, j, row[i])
                for j, i in enumerate(indices)
                if row[i]
            }
            for k, row in enumerate(self.plan.removed)
        ]

    def pack(self, solution: LayerSolution) -> Stored:
        """Part a solution into what is stored of it."""
        tensors = {"kept": solution.kept}
        for i, reader in enumerate(solution.readers):
            tensors[f"{i}.weight"] = reader.weight
            if reader.bias is not None:
                tensors[f"{i}.bias"] = reader.bias
        return tensors, {"error": solution.error, "damping": solution.damping}

    def unpack(self, name: str, stored: Stored, device: torch.device) -> LayerSolution:
        """Return the solution of a layer; the inverse of `pack`."""
        tensors, numbers = stored
        layer = next(layer for layer in self._job.layers if layer.name == name)
        readers = tuple(
            FittedReader(tensors[f"{i}.weight"], tensors.get(f"{i}.bias"))
            for i in range(len(layer.readers))
        )
        return LayerSolution(tensors["kept"], readers, **numbers).to(device)

    def network(self, base: Denoiser, solutions: Solutions) -> StagedDenoiser:
        """Build the staged denoiser of the layers solved so far around a base."""
        return assemble(self._job.adapter, base, self.plan, self._job.config, solutions)


def traced(job: Job, indices: Sequence[int], statistics: Collected) -> tuple[Job, Calibration]:
    """Trace some layers from their statistics; the job that comes back knows only those."""
    part = replace(job, layers=tuple(job.layers[i] for i in indices))
    frame = job.frame
    measured = Calibration(frame.division, frame.steps, part.layers, frame.power, statistics)
    return part, trace(part, measured, lambda what, done, total: None)


def trace_curves(
    job: Job, units: Sequence[Unit], statistics: Collected
) -> list[dict[str, RemovalCurve]]:
    """Return the removal curves of some layers in every stage."""
    _, measured = traced(job, [i for unit in units for i in unit.members], statistics)
    assert measured.curves is not None
    return [dict(row) for row in measured.curves]
