"""What may be removed from a denoiser, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

#: A diffusers denoiser: an nn.Module with a `config` and children that nn.Module's types hide.
Denoiser = Any


@dataclass(frozen=True)
class Columns:
    """Where the groups of a layer lie in a reader: input columns of a linear (or 1x1 convolution).

    Args:
        module: name of the reader.
        start: first of the columns.
        stop: behind the last of them; None where they are all that the reader has. The rest, then,
            is another layer's, as in `proj_out` over cat[attention, mlp].
    """

    module: str
    start: int = 0
    stop: int | None = None

    @property
    def name(self) -> str:
        """Name of this input in statistics, e.g. `proj_out[0:3072]`."""
        return self.module if self.stop is None else f"{self.module}[{self.start}:{self.stop}]"

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return these columns of the reader's weight as a matrix (m, n)."""
        return weight.flatten(1)[:, self.start : self.stop]

    def of_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return these channels of what the reader is given, (..., n)."""
        return x[..., self.start : self.stop]


@dataclass(frozen=True)
class Rows:
    """Where the groups of a layer lie in a writer: output rows of a linear, convolution or norm.

    Args:
        module: name of the writer.
        starts: first row of each run over all groups; the halves of a GEGLU are two runs.
        shared: whether the rest of its rows is another layer's.
        whole: whether all rows stay, those of the kept groups first: what follows is a norm across
            the groups, which needs them all; what follows the norm is cut.
    """

    module: str
    starts: tuple[int, ...] = (0,)
    shared: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", tuple(self.starts))


@dataclass(frozen=True)
class Piece:
    """What of one parameter belongs to a layer, and how the layer's groups lie in it.

    Args:
        name: of the piece: the parameter's, with the first index where it is not all of it.
        parameter: of the denoiser.
        axis: along which the groups lie; None where the layer's width leaves it alone.
        starts: first index of each run over all groups.
        partial: whether other layers have the rest.
        whole: as in `Rows`.
    """

    name: str
    parameter: str
    axis: int | None
    starts: tuple[int, ...] = (0,)
    partial: bool = False
    whole: bool = False

    def within(self, module: str) -> bool:
        """Return whether a module holds its parameter."""
        return self.parameter.startswith(f"{module}.")


@dataclass(frozen=True)
class PrunableLayer:
    """A layer whose width can shrink: the heads of an attention, the neurons of an FFN.

    Group g is columns g*width..(g+1)*width-1 of each reader, and the same rows of each run of each
    writer. Joint attention has two readers, of the image and of the text stream, which lose the
    same heads.

    Args:
        name: e.g. `transformer_blocks.0.attn1`; that of the module that holds them where there is
            one.
        kind: `heads` or `neurons`.
        readers: whose input columns are the groups.
        writers: whose output rows are the groups.
        groups: how many there are in the dense layer.
        width: columns of one group (the head dimension, or 1).
        cost: MACs of one group for one sample in readers and writers, attention products aside.
        products: MACs of one group's attention products for one sample.
        tokens: of one sample that go through the readers, all together.
        module: that holds the groups, where it is not `name`.
        attributes: integers of that module which say how wide it is: name, and units a group.
        least: groups that must stay, where the module cannot do without.
        unit: kept groups are multiples of this, or all, where a request leaves it to the device.
    """

    name: str
    kind: str
    readers: tuple[Columns, ...]
    writers: tuple[Rows, ...]
    groups: int
    width: int
    cost: int
    products: int = 0
    tokens: int = 0
    module: str = ""
    attributes: tuple[tuple[str, int], ...] = ()
    least: int = 0
    unit: int = 1

    def __post_init__(self) -> None:
        for name, kind in (("readers", Columns), ("writers", Rows)):  # dicts, if they are from JSON
            rows = tuple(kind(**v) if isinstance(v, dict) else v for v in getattr(self, name))
            object.__setattr__(self, name, rows)
        pairs = tuple((name, units) for name, units in self.attributes)
        object.__setattr__(self, "attributes", pairs)

    @property
    def block(self) -> str:
        """Name of the block that holds the layer."""
        return self.name.rpartition(".")[0]

    @property
    def home(self) -> str:
        """Name of the module that holds the groups."""
        return self.module or self.name

    @property
    def columns_of_groups(self) -> int:
        """Columns of all groups of the dense layer."""
        return self.groups * self.width

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the readers' inputs in statistics."""
        return tuple(reader.name for reader in self.readers)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all writers and readers."""
        return (*(w.module for w in self.writers), *(r.module for r in self.readers))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What the layer's width touches, and the readers' biases; some may not be there.

        The bias of a reader of several layers belongs to the layer of its first columns.
        """
        found = []
        for writer in self.writers:
            for part in ("weight", "bias"):
                name = f"{writer.module}.{part}"
                label = f"{name}[{writer.starts[0]}]" if writer.shared else name
                found.append(Piece(label, name, 0, writer.starts, writer.shared, writer.whole))
        for reader in self.readers:
            name, partial = f"{reader.module}.weight", reader.stop is not None
            label = f"{name}[{reader.start}]" if partial else name
            found.append(Piece(label, name, 1, (reader.start,), partial))
            if reader.start == 0:
                found.append(Piece(f"{reader.module}.bias", f"{reader.module}.bias", None))
        return tuple(found)

    def columns(self, groups: torch.Tensor) -> torch.Tensor:
        """Return the indices of the columns of some groups, (len(groups) * width,)."""
        offsets = torch.arange(self.width, device=groups.device)
        return (groups[:, None] * self.width + offsets).flatten()

    def dense(self, piece: Piece, parameter: torch.Tensor) -> torch.Tensor:
        """Return what of a dense parameter is this layer's piece."""
        if not piece.partial or piece.axis is None:
            return parameter
        runs = [parameter.narrow(piece.axis, s, self.columns_of_groups) for s in piece.starts]
        return runs[0] if len(runs) == 1 else torch.cat(runs, piece.axis)

    def narrow(self, piece: Piece, tensor: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Cut a piece down to some of the groups it holds; one that stays whole is put in order.

        Args:
            piece: of this layer.
            tensor: its values, for any number of groups (for all, where it stays whole).
            groups: places among those groups, sorted.
        """
        if piece.axis is None:
            return tensor
        index = self.indices(piece, groups, tensor.shape[piece.axis]).to(tensor.device)
        return tensor.index_select(piece.axis, index).contiguous()

    def indices(self, piece: Piece, groups: torch.Tensor, length: int) -> torch.Tensor:
        """Return where the values of `narrow` are in a piece so long."""
        run = length // len(piece.starts)
        columns = self.columns(groups)
        if piece.whole:
            left = torch.ones(run, dtype=torch.bool)
            left[columns] = False
            columns = torch.cat([columns, left.nonzero().flatten()])
        return torch.cat([columns + k * run for k in range(len(piece.starts))])


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


def leading_parameter(denoiser: Denoiser) -> torch.Tensor:
    """Return a parameter of the type, and on the device, that a denoiser is given its inputs in.

    Not one that diffusers keeps in float32 while the rest is in half precision.
    """
    kept = set(getattr(denoiser, "_keep_in_fp32_modules", None) or ())
    found: torch.Tensor = next(
        p for name, p in denoiser.named_parameters() if kept.isdisjoint(name.split("."))
    )
    return found


def shared_input(*names: str) -> list[WeightTarget]:
    """Return targets that are all given the same input."""
    return [WeightTarget(name, names[0]) for name in names]


def input_widths(layers: Iterable[PrunableLayer]) -> dict[str, int]:
    """Return how wide every reader's input is, by its name in statistics."""
    return {name: layer.columns_of_groups for layer in layers for name in layer.input_names}


def input_named(name: str) -> Columns:
    """Return which input a name of statistics means; the inverse of `Columns.name`."""
    module, bracket, rest = name.partition("[")
    if not bracket:
        return Columns(name)
    start, _, stop = rest.rstrip("]").partition(":")
    return Columns(module, int(start), int(stop))


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one denoiser call for one sample, in the two usual conventions."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention
