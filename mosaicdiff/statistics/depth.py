"""What whole layers and blocks change of the residual stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter
from ..config import PruneConfig
from ..groups import PrunableLayer
from ..trajectory.schedule import NoiseSchedule
from ..trajectory.stages import Stage
from .noising import CalibrationSet, draw_noisy


def measure_changes(
    denoiser: nn.Module,
    adapter: Adapter,
    layers: Sequence[PrunableLayer],
    stages: Sequence[Stage],
    schedule: NoiseSchedule,
    data: CalibrationSet,
    config: PruneConfig,
) -> list[dict[str, dict[str, float]]]:
    """Return, for each stage, `error` and `cosine` of dropping each layer and block.

    `error` is the mean square of what the layer or block adds to the stream, summed over the
    channels; `cosine` is 1 - cos of the stream before and after, mean over the tokens. A layer
    adds what the adapter says (its output times the gate, where there is one).
    """
    blocks = sorted({layer.block for layer in layers})
    rows = []
    for stage in stages:
        sums: dict[str, dict[str, float]] = {
            kind: defaultdict(float) for kind in ("error", "cosine")
        }
        tokens: dict[str, int] = defaultdict(int)

        def add(name: str, before: torch.Tensor, change: torch.Tensor, sums=sums, tokens=tokens):
            before, change = before.double().flatten(0, -2), change.double().flatten(0, -2)
            cosine = nn.functional.cosine_similarity(before, before + change, dim=-1)
            sums["error"][name] += float(change.square().sum())
            sums["cosine"][name] += float((1 - cosine).sum())
            tokens[name] += len(before)

        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + stage.first + 2)
        batches = draw_noisy(
            denoiser, adapter, stage, schedule, data, config, generator,
            samples=min(128, config.samples),
        )  # fmt: skip
        with torch.no_grad(), _watch(denoiser, adapter, blocks, add):
            for latents, timesteps, inputs in batches:
                adapter.predict(denoiser, latents, timesteps, inputs)
        rows.append(
            {
                kind: {name: value / tokens[name] for name, value in values.items()}
                for kind, values in sums.items()
            }
        )
    return rows


def _watch(denoiser: nn.Module, adapter: Adapter, blocks: Sequence[str], add: Any) -> ExitStack:
    """Hook the blocks; what the layers inside add is worked out from the block's own pieces."""
    stack = ExitStack()
    for block in blocks:
        module = denoiser.get_submodule(block)
        stack.enter_context(adapter.watch_block(module, block, add))
    return stack
