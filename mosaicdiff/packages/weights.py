"""Packages of linears that lose single weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..granularity import parse_pattern
from ..groups import Denoiser
from ..request import Job
from ..runtime import StagedDenoiser
from ..solving.masked import assemble_weights
from ..solving.weights import WeightSolution, prune_linear
from ..statistics.collect import Collected
from ..targets import choose_targets, target_shares
from .state import Stored
from .units import Unit, target_units

#: Keeps the draws of the criterion `random` apart from linear to linear.
_SEED_STEP = 1_000_003


class WeightPackages:
    """Solve linears at their shares, or by the pattern N:M, some at a time."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.targets = choose_targets(job.adapter, job.denoiser, job.config)
        self.shares = target_shares(self.targets, job.frame, job.config)
        self.units = target_units(job.denoiser, self.targets)

    def solve(
        self, units: Sequence[Unit], statistics: Collected
    ) -> list[dict[str, WeightSolution]]:
        """Prune some linears in every stage."""
        return [
            {
                self.targets[i].name: self._solve(k, i, statistics)
                for unit in units
                for i in unit.members
            }
            for k in range(len(statistics))
        ]

    def _solve(self, stage: int, index: int, statistics: Collected) -> WeightSolution:
        config, target = self._job.config, self.targets[index]
        rests = self._job.denoiser.get_submodule(target.name).weight.detach()
        weight = rests.to(self._job.device)
        seen = statistics[stage][target.source].unpack(weight.device)
        pattern = parse_pattern(config.granularity)
        generator = torch.Generator(weight.device)
        generator.manual_seed(config.seed + _SEED_STEP * (1 + stage * len(self.targets) + index))
        try:
            found = prune_linear(
                weight, seen, config.criterion,
                sparsity=None if pattern else self.shares[stage][index], pattern=pattern,
                damping=config.damping, generator=generator,
            )  # fmt: skip
            return replace(
                found, weight=found.weight.to(rests.device), mask=found.mask.to(rests.device)
            )
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"{error} (Linear {target.name}.)") from None

    def network(self, base: Denoiser, solutions: list[dict[str, WeightSolution]]) -> StagedDenoiser:
        """Build the staged denoiser of the linears solved so far around a base."""
        job = self._job
        return assemble_weights(
            job.adapter, base, job.frame.division, job.frame.steps, job.config, solutions
        )

    def pack(self, solution: WeightSolution) -> Stored:
        """Part a solution into what is stored of it."""
        return {"weight": solution.weight, "mask": solution.mask}, {
            "error": solution.error,
            "damping": solution.damping,
        }

    def unpack(self, name: str, stored: Stored, device: torch.device) -> WeightSolution:
        """Return the solution of a linear; the inverse of `pack`."""
        tensors, numbers = stored
        return WeightSolution(tensors["weight"].to(device), tensors["mask"].to(device), **numbers)
