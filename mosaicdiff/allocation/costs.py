"""What a pruned denoiser will cost in each unit, from what is kept, before it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..groups import Denoiser, Macs, PrunableLayer
from ..pack import dense_parts

#: Groups removed of each layer of each stage.
Removed = Sequence[Sequence[int]]
#: Groups kept of each layer of each stage, sorted.
Kept = Sequence[Sequence[torch.Tensor]]


@dataclass(frozen=True)
class LayerSize:
    """Parameters of a layer: of one group in writers and readers, and of the readers' biases."""

    writers: int
    reader: int
    bias: int


@dataclass(frozen=True)
class CostModel:
    """Count what plans cost.

    Args:
        layers: of the denoiser.
        steps: sampling steps of each stage.
        sizes: of the layers.
        dense_macs: of one call for one sample.
        dense_params: of the denoiser.
        element_bytes: of a parameter.
        repeated_params: of the denoiser's, those that are copies of others, stored once.
        file_overhead: bytes of the weights file beside the tensors, about.
        bias_per_stage: whether each stage has its own reader's bias (affine compensation).
        refitted: whether each stage has its own reader's weight; without compensation all stages
            keep slices of one.
        call_ms: for each layer, (groups + 1,) milliseconds at 0..groups kept; None where no
            latency was measured.
        fixed_ms: of a call beside the layers.
    """

    layers: tuple[PrunableLayer, ...]
    steps: tuple[int, ...]
    sizes: tuple[LayerSize, ...]
    dense_macs: Macs
    dense_params: int
    element_bytes: int
    file_overhead: int = 0
    repeated_params: int = 0
    bias_per_stage: bool = False
    refitted: bool = True
    call_ms: tuple[np.ndarray, ...] | None = None
    fixed_ms: float = 0.0

    def with_steps(self, steps: Sequence[int]) -> CostModel:
        """Return the same for another division of the sampling steps."""
        return replace(self, steps=tuple(steps))

    def with_latency(self, call_ms: Sequence[np.ndarray], fixed_ms: float) -> CostModel:
        """Return the same with measured milliseconds."""
        return replace(self, call_ms=tuple(call_ms), fixed_ms=fixed_ms)

    @property
    def prunable(self) -> int:
        """MACs of all that may be removed, of one call, attention products aside."""
        return sum(layer.groups * layer.cost for layer in self.layers)

    def dense(self, unit: str) -> float:
        """Return what the dense denoiser costs in a unit."""
        return {
            "sparsity": 0.0,
            "macs": float(self.dense_macs.total * sum(self.steps)),
            "params": float(self.dense_params),
            "size": float(self.dense_params * self.element_bytes),
            "latency": self.fixed_ms + sum(float(ms[-1]) for ms in self.call_ms or ()),
        }[unit]

    def cost(self, unit: str, removed: Removed, kept: Kept | None = None) -> float:
        """Return what a plan costs in a unit; params and size need to know what is kept.

        Without `kept`, params and size are the least that any choice of groups can come to.
        """
        total = sum(self.steps)
        if unit == "sparsity":
            return (
                sum(count * self._removed_macs(row) for count, row in self._rows(removed))
                / total
                / self.prunable
            )
        if unit == "macs":
            saved = sum(
                count * (self._removed_macs(row) + self._removed_products(row))
                for count, row in self._rows(removed)
            )
            return self.dense("macs") - saved
        if unit == "latency":
            curves = self.call_ms or ()
            spent = sum(
                count * float(ms[layer.groups - gone])
                for count, row in self._rows(removed)
                for layer, ms, gone in zip(self.layers, curves, row, strict=True)
            )
            return self.fixed_ms + spent / total
        params, indices = self._stored(removed, kept)
        if unit == "params":
            return float(params)
        return float(params * self.element_bytes + 4 * indices + self.file_overhead)

    def _rows(self, removed: Removed) -> list[tuple[int, Sequence[int]]]:
        return list(zip(self.steps, removed, strict=True))

    def _removed_macs(self, row: Sequence[int]) -> int:
        return sum(n * layer.cost for n, layer in zip(row, self.layers, strict=True))

    def _removed_products(self, row: Sequence[int]) -> int:
        return sum(n * layer.products for n, layer in zip(row, self.layers, strict=True))

    def _stored(self, removed: Removed, kept: Kept | None) -> tuple[int, int]:
        """Return parameters and kept indices of a checkpoint; see docs/checkpoint-format.md."""
        params, indices = self.dense_params - self.repeated_params, 0
        for i, (layer, size) in enumerate(zip(self.layers, self.sizes, strict=True)):
            counts = [layer.groups - row[i] for row in removed]
            whole = any(n == layer.groups for n in counts)
            cut = [n for n in counts if n < layer.groups]
            if not cut:
                continue
            if whole:
                union = layer.groups
            elif kept is None:
                union = max(counts)
            else:
                union = len(torch.cat([stage[i] for stage in kept]).unique())
            readers = sum(cut) + (layer.groups if whole else 0)
            if len(counts) == 1:
                readers = counts[0]
            elif not self.refitted:
                readers = union
            biases = len(cut) + whole if self.bias_per_stage else 1
            params -= layer.groups * (size.writers + size.reader) + size.bias
            params += union * size.writers + readers * size.reader + biases * size.bias
            indices += sum(cut)
        return params, indices

    def savings(self, unit: str) -> list[list[np.ndarray]]:
        """Return what removing 0..groups of each layer of each stage saves, about, in a unit.

        Exact for MACs and sparsity. For params and size what is stored once for all stages,
        such as the writers, counts in equal parts for each; `cost` tells the truth.
        """
        rows = []
        for count in self.steps:
            row = []
            for i, (layer, size) in enumerate(zip(self.layers, self.sizes, strict=True)):
                gone = np.arange(layer.groups + 1, dtype=np.float64)
                if unit == "latency" and self.call_ms is not None:
                    ms = self.call_ms[i]
                    row.append(count * (ms[-1] - ms[::-1]))
                    continue
                if unit == "macs":
                    each = float(count * (layer.cost + layer.products))
                elif unit in ("params", "size"):
                    once = size.writers if self.refitted else size.writers + size.reader
                    each = size.reader * self.refitted + once / len(self.steps)
                else:
                    each = float(count * layer.cost)
                row.append(each * gone)
            rows.append(row)
        return rows


def layer_sizes(denoiser: Denoiser, layers: Sequence[PrunableLayer]) -> tuple[LayerSize, ...]:
    """Count the parameters of every layer's linears."""
    sizes = []
    for layer in layers:
        held = dense_parts(denoiser, layer)
        writers = reader = bias = 0
        for piece in layer.pieces:
            count = held[piece.name].numel() if piece.name in held else 0
            if piece.axis is None:
                bias += count
            elif piece.axis == 1:
                reader += count // layer.groups
            elif not piece.whole:
                writers += count // layer.groups
        sizes.append(LayerSize(writers, reader, bias))
    return tuple(sizes)


def describe_cost(unit: str, value: float) -> str:
    """Format a cost for a message."""
    if unit == "sparsity":
        return f"{value:.2%}"
    if unit == "latency":
        return f"{value:.3g} ms"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.4g}{suffix}" + ("B" if unit == "size" else "")
    return f"{value:.4g}" + (" B" if unit == "size" else "")
