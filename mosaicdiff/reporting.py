"""From what was done to a report of it: counts of the staged denoiser beside the dense one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .allocation.decide import Decision
from .checkpoint import storage_of
from .masked_storage import stored_size
from .report import (
    DecisionReport,
    LayerReport,
    PackagesReport,
    PruneReport,
    StageReport,
    weight_rows,
)
from .request import Job
from .runtime import StagedDenoiser


def report_of(
    job: Job,
    staged: StagedDenoiser,
    decision: Decision | None,
    solutions: Sequence[Mapping[str, Any]],
    packages: PackagesReport | None = None,
) -> PruneReport:
    """Count what a pruned denoiser is, beside the dense one; the time is left at 0.

    Args:
        decision: what layers give up; None where single weights went.
        solutions: of each stage, by name.
        packages: how they were solved, where it was in packages.
    """
    dense, pruned = job.costs.dense_macs, staged.macs()
    mean, mean_with_attention = staged.mean_macs(pruned)
    steps, total = staged.info.steps, sum(staged.info.steps)
    stages = []
    for k, (stage, macs) in enumerate(zip(staged.division.stages, pruned, strict=True)):
        rows = [] if decision is None else _layer_rows(decision, solutions[k])
        stages.append(
            StageReport(
                stage.name,
                stage.first,
                stage.last,
                steps[k],
                _weight_sparsity(job, solutions[k])
                if decision is None
                else decision.plan.stage_sparsity(k),
                macs.linear,
                macs.total,
                rows,
                weight_rows(solutions[k]) if decision is None else [],
            )
        )
    parameters, size = stored_size(storage_of(staged)[0].items())
    per_step = [sum(p.numel() for p in stage.parameters()) for stage in staged.stage_models]
    return PruneReport(
        stages=stages,
        sparsity=sum(n * stage.sparsity for n, stage in zip(steps, stages, strict=True)) / total,
        latent_power=job.frame.power,
        macs_dense=dense.linear,
        macs_dense_with_attention=dense.total,
        macs=mean,
        macs_with_attention=mean_with_attention,
        parameters_dense=sum(p.numel() for p in job.denoiser.parameters()),
        parameters=parameters,
        parameters_per_step=sum(n * c for n, c in zip(per_step, steps, strict=True)) / total,
        bytes_dense=_bytes(job.denoiser.parameters()),
        bytes=size,
        resident_bytes=_bytes(staged.parameters()),
        seconds=0.0,
        decision=None if decision is None else DecisionReport(
            allocation=job.config.allocation,
            budget=str(decision.budget),
            reached=decision.reached,
            predicted_error=decision.predicted_error,
            measured=decision.measured,
        ),
        packages=packages,
    )  # fmt: skip


def _layer_rows(decision: Decision, solved: Mapping[str, Any]) -> list[LayerReport]:
    rows = []
    for layer in decision.plan.layers:
        solution = solved.get(layer.name)
        kept, error, damping = (
            (layer.groups, 0.0, 0.0)
            if solution is None
            else (len(solution.kept), solution.error, solution.damping)
        )
        rows.append(LayerReport(layer.name, layer.kind, layer.groups, kept, error, damping))
    return rows


def _weight_sparsity(job: Job, solved: Mapping[str, Any]) -> float:
    """Return the share of the weights of all linears of the blocks that are gone."""
    names = [target.name for target in job.adapter.targets(job.denoiser)]
    total = sum(job.denoiser.get_submodule(name).weight.numel() for name in names)
    return sum(int((~solution.mask).sum()) for solution in solved.values()) / total


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
