"""What may be removed from a denoiser, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

#: A diffusers denoiser: an nn.Module with a `config` and children that nn.Module's types hide.
Denoiser = Any


@dataclass(frozen=True)
class PrunableLayer:
    """A layer whose width can shrink: the heads of an attention, the neurons of an FFN.

    Group g is columns g*width..(g+1)*width-1 of the reader's weight, and the same rows of each
    writer's weight and bias.

    Args:
        name: of the module that holds them, e.g. `transformer_blocks.0.attn1`.
        kind: `heads` or `neurons`.
        reader: name of the linear layer whose input columns are the groups.
        writers: names of the linear layers whose output rows are the groups.
        groups: how many there are in the dense layer.
        width: columns of one group (the head dimension, or 1).
        cost: MACs of one group for one sample in reader and writers, attention products aside.
        products: MACs of one group's attention products for one sample.
    """

    name: str
    kind: str
    reader: str
    writers: tuple[str, ...]
    groups: int
    width: int
    cost: int
    products: int = 0

    @property
    def block(self) -> str:
        """Name of the block that holds the layer."""
        return self.name.rpartition(".")[0]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors that the layer's width touches, and the reader's bias."""
        writers = (f"{w}.{part}" for w in self.writers for part in ("weight", "bias"))
        return (*writers, f"{self.reader}.weight", f"{self.reader}.bias")

    def columns(self, groups: torch.Tensor) -> torch.Tensor:
        """Return the indices of the columns of some groups, (len(groups) * width,)."""
        offsets = torch.arange(self.width, device=groups.device)
        return (groups[:, None] * self.width + offsets).flatten()

    def narrow(self, parameter: str, tensor: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Cut a tensor of this layer, as wide as `groups` counts, down to some of its groups."""
        if parameter == f"{self.reader}.bias":
            return tensor
        dim = 1 if parameter == f"{self.reader}.weight" else 0
        return tensor.index_select(dim, self.columns(groups).to(tensor.device)).contiguous()


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one denoiser call for one sample, in the two usual conventions."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention
