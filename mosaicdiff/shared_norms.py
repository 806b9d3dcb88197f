"""Norms over all heads that see the kept heads alone: made good on average, and what is lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
from .statistics.capture import capture_inputs, evaluating
from .statistics.gather import clean_data
from .statistics.noising import draw_noisy
from .surgery import Surgeon
from .trajectory.stages import Stage

#: Noised samples of each stage that errors are measured on.
SAMPLES = 16
_SEED_OFFSET = 7_000_003

#: Latents, timesteps as the scheduler calls them, and conditions.
Call = tuple[torch.Tensor, torch.Tensor, dict[str, Any]]


def fold_statistics(job: Job, staged: StagedDenoiser) -> None:
    """Scale approximate norms by the mean square that the kept heads have among all of them.

    A norm of the kept heads alone divides by their root mean square, not by that of all heads. The
    expected ratio of the two, in each stage, goes into the norm's weight. What is left is how the
    ratio varies from token to token. On random Wan models of 8 heads of which 5 stay, heads of
    equal loudness, the output's error stayed 3e-4; with a spread of 0.3 and 0.8 in the logarithm
    it fell from 1.0e-3 to 4e-4, and from 2.4e-3 to 3e-4.

    Args:
        job: whose denoiser is the dense one.
        staged: with approximate norms; its norms are changed.
    """
    exact = job.adapter.layers(job.denoiser, "exact")
    norms = [w.module for layer in exact for w in layer.writers if w.whole]
    norms = [name for name in norms if job.denoiser.get_parameter(f"{name}.weight").ndim == 1]
    for k, stage in enumerate(staged.division.stages):
        squares = _squares(job, norms, _noised(job, stage, "statistics of norms", 0))
        for layer in staged.info.layers:
            kept = staged.info.kept[k].get(layer.name)
            if kept is None or len(kept) == 0:
                continue
            columns = layer.columns(kept)
            for name in (w.module for w in layer.writers if w.module in squares):
                mean = squares[name].mean()
                if mean > 0:
                    ratio = (squares[name][columns].mean() / mean).sqrt()
                    staged.stage_models[k].get_parameter(f"{name}.weight").data.mul_(ratio)


def _squares(job: Job, norms: list[str], calls: Iterable[Call]) -> dict[str, torch.Tensor]:
    """Sum the squares of each channel of what norms of the dense denoiser are given, float64."""
    found: dict[str, torch.Tensor] = {}

    def receive(name: str, x: torch.Tensor) -> None:
        total = x.detach().float().flatten(0, -2).square().sum(0, dtype=torch.float64).cpu()
        found[name] = found[name] + total if name in found else total

    with torch.no_grad(), evaluating(job.denoiser), capture_inputs(job.denoiser, norms, receive):
        for latents, timesteps, inputs in calls:
            job.adapter.predict(job.denoiser, latents, timesteps, inputs)
    return found


def with_norm_errors(job: Job, staged: StagedDenoiser, report: PruneReport) -> PruneReport:
    """Add to a report what the approximation changes of the denoiser's output in each stage.

    Raises:
        RuntimeError: an output is not finite.
    """
    stages = []
    for k, (stage, row) in enumerate(zip(staged.division.stages, report.stages, strict=True)):
        calls = _noised(job, stage, "the error of approximate norms", 1)
        stages.append(replace(row, norm_error=norm_error(job.denoiser, staged, k, calls)))
    return replace(report, stages=stages)


def _noised(job: Job, stage: Stage, purpose: str, draw: int) -> Iterator[Call]:
    """Yield noised samples of a stage; another `draw` gives others."""
    # What the pipeline drew comes with its conditions, null or not.
    drawn = job.config if job.data is not None else replace(job.config, null_share=0.0)
    seed = _SEED_OFFSET + 1_000_003 * (2 * job.config.seed + draw) + stage.first
    return draw_noisy(
        job.denoiser, job.adapter, stage, job.frame.schedule, clean_data(job, purpose), drawn,
        torch.Generator().manual_seed(seed), SAMPLES,
    )  # fmt: skip


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
