"""What is lost where norms over all heads see the kept heads alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .adapters import Adapter
from .groups import Denoiser
from .pack import LayerState, dense_parts, narrow_parts
from .report import PruneReport
from .request import Job
from .runtime import StagedDenoiser
from .statistics.capture import evaluating
from .statistics.gather import clean_data
from .statistics.noising import draw_noisy
from .surgery import Surgeon

#: Noised samples of each stage that errors are measured on.
SAMPLES = 16
_SEED_OFFSET = 7_000_003

#: Latents, timesteps as the scheduler calls them, and conditions.
Call = tuple[torch.Tensor, torch.Tensor, dict[str, Any]]


def with_norm_errors(job: Job, staged: StagedDenoiser, report: PruneReport) -> PruneReport:
    """Add to a report what the approximation changes of the denoiser's output in each stage.

    Raises:
        RuntimeError: an output is not finite.
    """
    # What the pipeline drew comes with its conditions, null or not.
    drawn = job.config if job.data is not None else replace(job.config, null_share=0.0)
    data = clean_data(job, "the error of approximate norms")
    stages = []
    for k, (stage, row) in enumerate(zip(staged.division.stages, report.stages, strict=True)):
        generator = torch.Generator().manual_seed(_SEED_OFFSET + job.config.seed + stage.first)
        calls = draw_noisy(
            job.denoiser, job.adapter, stage, job.frame.schedule, data, drawn, generator, SAMPLES
        )
        stages.append(replace(row, norm_error=norm_error(job.denoiser, staged, k, calls)))
    return replace(report, stages=stages)


def norm_error(dense: Denoiser, staged: StagedDenoiser, stage: int, calls: Iterable[Call]) -> float:
    """Measure how far a stage is from the same kept heads with exact norms.

    Args:
        dense: that it was made from.
        staged: with approximate norms.
        stage: which.
        calls: what both are called with.

    Returns:
        The mean squared difference of their outputs over the mean square of the exact one's.

    Raises:
        RuntimeError: an output is not finite, or nothing but zeros.
    """
    adapter = staged.adapter
    mine = staged.stage_models[stage]
    twin = exact_twin(adapter, dense, mine, staged, staged.info.kept[stage])
    difference = energy = 0.0
    with torch.no_grad(), evaluating(dense), evaluating(mine):
        twin.eval()
        for latents, timesteps, inputs in calls:
            exact = adapter.predict(twin, latents, timesteps, inputs).double()
            given = adapter.predict(mine, latents, timesteps, inputs).double()
            difference += float((given - exact).square().sum())
            energy += float(exact.square().sum())
    error = difference / energy if energy > 0 else float("nan")
    if not error < float("inf"):
        raise RuntimeError(
            f"prune: the output of stage {stage} must be finite and not all zero, got a squared "
            f"difference of {difference:g} over {energy:g} with approximate norms. Use "
            "shared_norms='exact'."
        )
    return error


def exact_twin(
    adapter: Adapter,
    dense: Denoiser,
    mine: nn.Module,
    staged: StagedDenoiser,
    kept: Mapping[str, torch.Tensor],
) -> nn.Module:
    """Return a stage of the same kept groups and the same readers, whose norms are exact."""
    layers = {layer.name: layer for layer in adapter.layers(dense, "exact")}
    cut = Surgeon(adapter, staged.info.layers)
    states = {}
    for layer in staged.info.layers:
        if layer.name in kept:
            exact = layers[layer.name]
            readers = {reader.module for reader in layer.readers}
            refitted = {
                name: tensor
                for name, tensor in cut.parts(mine, layer, kept).items()
                if name.partition("[")[0].rpartition(".")[0] in readers
            }
            parts = narrow_parts(dense_parts(dense, exact), exact, kept[layer.name])
            states[layer.name] = LayerState(kept[layer.name], parts | refitted)
    return Surgeon(adapter, tuple(layers.values())).build(dense, states).root
