"""What may be removed from a denoiser, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

#: A diffusers denoiser: an nn.Module with a `config` and children that nn.Module's types hide.
Denoiser = Any


@dataclass(frozen=True)
class PrunableLayer:
    """A layer whose width can shrink: the heads of an attention, the neurons of an FFN.

    Group g is columns g*width..(g+1)*width-1 of each reader's weight, and the same rows of each
    writer's weight and bias. Joint attention has two readers, of the image and of the text
    stream, which lose the same heads.

    Args:
        name: of the module that holds them, e.g. `transformer_blocks.0.attn1`.
        kind: `heads` or `neurons`.
        readers: names of the linear layers whose input columns are the groups.
        writers: names of the linear layers whose output rows are the groups.
        groups: how many there are in the dense layer.
        width: columns of one group (the head dimension, or 1).
        cost: MACs of one group for one sample in readers and writers, attention products aside.
        products: MACs of one group's attention products for one sample.
        fixed: names of tensors inside the module that its width leaves alone (q/k norms).
    """

    name: str
    kind: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    groups: int
    width: int
    cost: int
    products: int = 0
    fixed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("readers", "writers", "fixed"):  # lists, where they come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def block(self) -> str:
        """Name of the block that holds the layer."""
        return self.name.rpartition(".")[0]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors that the layer's width touches, the readers' biases and `fixed`."""
        linears = (*self.writers, *self.readers)
        names = tuple(f"{linear}.{part}" for linear in linears for part in ("weight", "bias"))
        return (*names, *self.fixed)

    def axis(self, parameter: str) -> int | None:
        """Return the dimension of one of `parameters` along which the groups lie, if any."""
        if parameter in self.fixed:
            return None
        linear, _, part = parameter.rpartition(".")
        if linear in self.readers:
            return 1 if part == "weight" else None
        return 0

    def columns(self, groups: torch.Tensor) -> torch.Tensor:
        """Return the indices of the columns of some groups, (len(groups) * width,)."""
        offsets = torch.arange(self.width, device=groups.device)
        return (groups[:, None] * self.width + offsets).flatten()

    def narrow(self, parameter: str, tensor: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Cut a tensor of this layer, as wide as `groups` counts, down to some of its groups."""
        dim = self.axis(parameter)
        if dim is None:
            return tensor
        return tensor.index_select(dim, self.columns(groups).to(tensor.device)).contiguous()


@dataclass(frozen=True)
class WeightTarget:
    """A linear layer that single weights may be removed from.

    Args:
        name: of the linear.
        source: name of the linear whose input is accumulated for it: its own, or that of the
            first of several that are given the same input (q, k and v).
    """

    name: str
    source: str


def shared_input(*names: str) -> list[WeightTarget]:
    """Return targets that are all given the same input."""
    return [WeightTarget(name, names[0]) for name in names]


def reader_widths(layers: Iterable[PrunableLayer]) -> dict[str, int]:
    """Return the input features of every reader of some layers."""
    return {name: layer.groups * layer.width for layer in layers for name in layer.readers}


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one denoiser call for one sample, in the two usual conventions."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention
