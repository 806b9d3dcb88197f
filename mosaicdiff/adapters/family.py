"""A family of denoisers as a declaration: blocks, their prunable layers, and how wide they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..groups import Columns, Denoiser, PrunableLayer, Rows

#: Streams whose tokens go through linears, and the linears, which share their input.
Inputs = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Heads:
    """Heads of one attention of a block.

    Names of linears and norms are those inside the attention, or, with a leading `/`, inside the
    block. Those that a model does not have are left out. Streams are joined by `+`.

    Args:
        attention: name of the module in the block.
        writers: that make queries, keys and values, by what they are given.
        readers: that take what the heads give: (stream, linear).
        attends: (streams of the queries, streams of the keys) of each attention product.
        per_group: integers of the module that are the number of heads.
        per_column: those that are the width of all heads together.
        untouched: those that are not, though they may be as large.
        width: name of the head's width in the configuration; where empty, what the first writer
            gives a head.
        across: norms over all heads together, each with the linear before it.
        linear: whether attention is linear, whose products grow with the tokens alone.
        least: heads that must stay.
    """

    attention: str
    writers: tuple[Inputs, ...]
    readers: tuple[tuple[str, str], ...]
    attends: tuple[tuple[str, str], ...]
    per_group: tuple[str, ...] = ("heads",)
    per_column: tuple[str, ...] = ("inner_dim",)
    untouched: tuple[str, ...] = ()
    width: str = "attention_head_dim"
    across: tuple[tuple[str, str], ...] = ()
    linear: bool = False
    least: int = 0

    @property
    def name(self) -> str:
        return self.attention

    @property
    def home(self) -> str:
        return self.attention

    @property
    def written(self) -> tuple[Inputs, ...]:
        """Writers by what they are given."""
        return self.writers

    @property
    def read(self) -> tuple[tuple[str, str], ...]:
        """Readers with their streams."""
        return self.readers

    def path(self, name: str) -> str:
        """Return a name inside the block."""
        return name[1:] if name.startswith("/") else f"{self.attention}.{name}"


@dataclass(frozen=True)
class Neurons:
    """Neurons of one feed-forward of a block.

    A writer with twice as many rows as there are neurons holds two halves, as of a GEGLU: neuron j
    is rows j and j + neurons.

    Args:
        name: of the layer in the block: the module's, or one made up (`mlp`).
        writers: linears and depthwise convolutions (names as in `Heads`, inside `home`).
        reader: that takes what the neurons give.
        stream: whose tokens go through.
        home: module that holds them, where it is not `name`; `.` is the block itself.
        per_group, untouched, least: as in `Heads`.
    """

    name: str
    writers: tuple[str, ...]
    reader: str
    stream: str
    home_name: str = ""
    per_group: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()
    least: int = 0

    @property
    def home(self) -> str:
        return self.home_name or self.name

    @property
    def written(self) -> tuple[Inputs, ...]:
        """Writers by what they are given."""
        return ((self.stream, self.writers),)

    @property
    def read(self) -> tuple[tuple[str, str], ...]:
        """Readers with their streams."""
        return ((self.stream, self.reader),)

    def path(self, name: str) -> str:
        """Return a name inside the block."""
        return name if self.home == "." else f"{self.home}.{name}"


@dataclass(frozen=True)
class Blocks:
    """Blocks of one kind.

    Args:
        pattern: of their names; `*` stands for an index.
        layers: what may be removed of each, in the order of the forward.
        packed: linears (names in the block) that several layers lie in, with the layers in the
            order of their rows or columns: `{"proj_out": ("attn", "mlp")}`.
    """

    pattern: str
    layers: tuple[Heads | Neurons, ...]
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def names(self, denoiser: Denoiser) -> list[str]:
        """Return the names of these blocks of a denoiser, in order; none where it has none."""
        return list(_matching(denoiser, self.pattern.split("."), ""))

    def layers_of(
        self, denoiser: Denoiser, name: str, tokens: Mapping[str, int], shared_norms: str
    ) -> Iterator[PrunableLayer]:
        """Describe what may be removed of one block.

        Args:
            tokens: of each stream, of one sample.
        """
        block = denoiser.get_submodule(name)
        present = [spec for spec in self.layers if _find(block, _first(spec)) is not None]
        sizes = {s.name: _size(denoiser, block, s) for s in present if isinstance(s, Heads)}
        for spec in present:
            if isinstance(spec, Neurons):
                linear = spec.path(spec.reader)
                columns = _module(block, linear).weight.shape[1]
                others = [sizes[n] for n in self.packed.get(linear, ()) if n != spec.name]
                sizes[spec.name] = (columns - sum(g * w for g, w in others), 1)
        for spec in present:
            yield _Describer(self, block, name, spec, sizes, tokens, shared_norms).layer()


class _Describer:
    """Describe one layer of one block."""

    def __init__(
        self,
        kind: Blocks,
        block: nn.Module,
        prefix: str,
        spec: Heads | Neurons,
        sizes: Mapping[str, tuple[int, int]],
        tokens: Mapping[str, int],
        shared_norms: str,
    ) -> None:
        self._kind, self._block, self._prefix, self._spec = kind, block, prefix, spec
        self._sizes, self._tokens = sizes, tokens
        self._exact = shared_norms == "exact"
        self._groups, self._width = sizes[spec.name]

    def layer(self) -> PrunableLayer:
        spec = self._spec
        heads = isinstance(spec, Heads)
        read = [(stream, spec.path(n)) for stream, n in spec.read if self._has(n)]
        written = [(s, spec.path(n)) for s, names in spec.written for n in names if self._has(n)]
        across = dict(spec.across) if isinstance(spec, Heads) else {}
        norms = {spec.path(n): spec.path(w) for n, w in across.items() if self._has(n)}
        whole = set(norms.values()) if self._exact else set()
        rows = [self._rows(linear, linear in whole) for _, linear in written]
        rows += [self._rows(norm, self._exact) for norm in norms]
        cost = sum(
            self._count(stream) * len(r.starts) * self._row_weights(linear) * self._width
            for (stream, linear), r in zip(written, rows, strict=False)
            if not r.whole
        )
        cost += sum(
            self._count(stream) * self._width * _module(self._block, linear).weight.shape[0]
            for stream, linear in read
        )
        home = self._full("" if spec.home == "." else spec.home)
        units = [(n, 1) for n in spec.per_group]
        if isinstance(spec, Heads):
            units += [(n, self._width) for n in spec.per_column]
        self._check_attributes(home, {n for n, _ in units} | set(spec.untouched))
        name = self._full(spec.name)
        return PrunableLayer(
            name=name,
            kind="heads" if heads else "neurons",
            readers=tuple(self._columns(linear) for _, linear in read),
            writers=tuple(rows),
            groups=self._groups,
            width=self._width,
            cost=cost,
            products=self._products() if heads else 0,
            tokens=sum(self._count(stream) for stream, _ in read),
            module="" if home == name else home,
            attributes=tuple(units),
            least=spec.least,
        )

    def _full(self, name: str) -> str:
        return f"{self._prefix}.{name}" if name else self._prefix

    def _has(self, name: str) -> bool:
        return _find(self._block, self._spec.path(name)) is not None

    def _count(self, streams: str) -> int:
        return sum(self._tokens[stream] for stream in streams.split("+"))

    def _row_weights(self, linear: str) -> int:
        return _module(self._block, linear).weight[0].numel()

    def _starts(self, linear: str) -> tuple[int, ...]:
        """Return where this layer's runs begin in a packed linear."""
        starts, cursor = [], 0
        for name in self._kind.packed[linear]:
            if name == self._spec.name:
                starts.append(cursor)
            groups, width = self._sizes[name]
            cursor += groups * width
        return tuple(starts)

    def _rows(self, linear: str, whole: bool) -> Rows:
        if linear in self._kind.packed:
            return Rows(self._full(linear), self._starts(linear), shared=True)
        starts: tuple[int, ...] = (0,)
        if isinstance(self._spec, Neurons):  # two halves where there are twice as many rows
            rows = _module(self._block, linear).weight.shape[0]
            starts = tuple(range(0, rows, self._groups)) if rows > self._groups else starts
        return Rows(self._full(linear), starts, whole=whole)

    def _columns(self, linear: str) -> Columns:
        if linear not in self._kind.packed:
            return Columns(self._full(linear))
        (start,) = self._starts(linear)
        return Columns(self._full(linear), start, start + self._groups * self._width)

    def _products(self) -> int:
        spec: Any = self._spec
        if spec.linear:  # keys by values, and queries by that; a row of ones beside the values
            return sum(self._count(q) * self._width * 2 for q, _ in spec.attends) * (
                self._width + 1
            )
        return sum(2 * self._count(q) * self._count(k) * self._width for q, k in spec.attends)

    def _check_attributes(self, home: str, known: set[str]) -> None:
        """Refuse a module that keeps its width where the declaration does not say.

        Raises:
            ValueError: names the attribute.
        """
        module = _find(self._block, "" if self._spec.home == "." else self._spec.home)
        sizes = {self._groups, self._groups * self._width}
        for name, value in vars(module).items():
            wide = type(value) is int and value in sizes and not name.startswith("_")
            if wide and value > 1 and name not in known:
                raise ValueError(
                    f"prune: {home}.{name} must be declared by its family, as what a smaller "
                    f"layer changes or never touches, got {value} undeclared. This version of "
                    "diffusers keeps a width there that mosaicdiff does not know."
                )
        for name in known - set(getattr(self._spec, "untouched", ())):
            if not hasattr(module, name):
                raise ValueError(
                    f"prune: {home} must have {name}, which says how wide it is, but it has not. "
                    "This version of diffusers keeps its width elsewhere."
                )


def _first(spec: Heads | Neurons) -> str:
    """Name a module that is there only where the layer is."""
    if isinstance(spec, Heads):
        return spec.attention
    return spec.path(spec.reader)


def _find(block: nn.Module, name: str) -> Any:
    """Return a module by name; None where it, or one on the way, is missing or None."""
    found: Any = block
    for part in filter(None, name.split(".")):
        found = getattr(found, part, None) if not part.isdecimal() else _indexed(found, int(part))
        if found is None:
            return None
    return found


def _indexed(modules: Any, index: int) -> Any:
    try:
        return modules[index]
    except (TypeError, IndexError):
        return None


def _module(block: nn.Module, name: str) -> Any:
    return block.get_submodule(name)


def _size(denoiser: Denoiser, block: nn.Module, spec: Heads) -> tuple[int, int]:
    """Return the number and the width of the heads of an attention."""
    heads = _find(block, spec.attention).heads
    if spec.width:
        return heads, getattr(denoiser.config, spec.width)
    first = _module(block, spec.path(spec.writers[0][1][0]))
    return heads, first.weight.shape[0] // heads


def _matching(module: Any, parts: list[str], prefix: str) -> Iterator[str]:
    if not parts:
        yield prefix
        return
    head, *rest = parts
    names = [name for name, _ in module.named_children()] if head == "*" else [head]
    for name in names:
        child = _find(module, name)
        if child is not None:
            yield from _matching(child, rest, f"{prefix}.{name}" if prefix else name)
