"""Put the kept parts of layers into a stage, and take them out again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .adapters import Adapter
from .adapters.common import check_fit
from .groups import Denoiser, Piece, PrunableLayer
from .pack import (
    LayerState,
    LeadingColumns,
    Parts,
    StageBuilder,
    StandIn,
    dense_parts,
    resized,
)


class Surgeon:
    """Make stages of a dense denoiser from what they keep of its layers.

    Args:
        adapter: of the denoiser.
        layers: all that may be removed of it: several may lie in one parameter.
    """

    def __init__(self, adapter: Adapter, layers: Sequence[PrunableLayer]) -> None:
        self._adapter, self._layers = adapter, {layer.name: layer for layer in layers}
        #: For each parameter that several layers lie in, their runs in order.
        self._runs: dict[str, list[tuple[int, PrunableLayer, Piece, int]]] = defaultdict(list)
        #: For each parameter, the pieces along whose groups it is cut.
        self._pieces: dict[str, list[tuple[PrunableLayer, Piece]]] = {}
        for layer in layers:
            for piece in layer.pieces:
                if piece.axis is not None:
                    self._pieces.setdefault(piece.parameter, []).append((layer, piece))
                if piece.partial and piece.axis is not None:
                    for number, start in enumerate(piece.starts):
                        self._runs[piece.parameter].append((start, layer, piece, number))
        for runs in self._runs.values():
            runs.sort(key=lambda run: run[0])

    def build(self, dense: nn.Module, states: Mapping[str, LayerState]) -> StageBuilder:
        """Return a stage of the dense denoiser in which the named layers are smaller.

        What is not named is the dense denoiser's own.

        Raises:
            ValueError: the smaller modules do not fit together.
        """
        builder = StageBuilder(dense)
        tensors: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        leading: dict[str, int] = {}
        standing = set()
        for name, state in states.items():
            layer = self._layers[name]
            stand_in = None
            if len(state.kept) == 0:
                stand_in = self._adapter.stand_in(builder.root, layer, reader_biases(layer, state))
            if stand_in is not None:
                builder.replace(layer.home, stand_in)
                standing.add(name)
            for piece in layer.pieces:
                if stand_in is not None and piece.within(layer.home):
                    continue
                if piece.name in state.parts:
                    module, _, leaf = piece.parameter.rpartition(".")
                    tensors[module][leaf] = self._parameter(dense, piece, states)
            for writer in layer.writers if stand_in is None else ():
                if writer.whole and not _projects(dense, writer.module):
                    leading[writer.module] = len(state.kept) * layer.width
        for module, held in tensors.items():
            builder.replace(module, resized(dense.get_submodule(module), held))
        for module, columns in leading.items():
            norm: Any = builder.root.get_submodule(module)
            layer = next(x for x in self._layers.values() if module in x.modules)
            builder.replace(module, LeadingColumns(norm, layer.columns_of_groups, columns))
        for name, state in states.items():
            if name not in standing:
                self._finish(builder, self._layers[name], state)
        self._adapter.simplify(builder)
        return builder

    def _parameter(
        self, dense: Denoiser, piece: Piece, states: Mapping[str, LayerState]
    ) -> torch.Tensor:
        """Return a parameter of a stage, of all layers that lie in it."""
        runs = self._runs.get(piece.parameter)
        if runs is None or piece.axis is None:
            return next(s.parts[piece.name] for s in states.values() if piece.name in s.parts)
        whole = dense.get_parameter(piece.parameter).detach()
        found, cursor = [], 0
        for start, layer, part, number in runs:
            if start > cursor:
                found.append(whole.narrow(piece.axis, cursor, start - cursor))
            cursor = start + layer.columns_of_groups
            if layer.name in states:
                held = states[layer.name].parts[part.name]
                length = held.shape[piece.axis] // len(part.starts)
                found.append(held.narrow(piece.axis, number * length, length))
            else:
                found.append(whole.narrow(piece.axis, start, layer.columns_of_groups))
        if cursor < whole.shape[piece.axis]:
            found.append(whole.narrow(piece.axis, cursor, whole.shape[piece.axis] - cursor))
        return torch.cat(found, piece.axis)

    def _finish(self, builder: StageBuilder, layer: PrunableLayer, state: LayerState) -> None:
        """Tell a layer's module how wide it is, and check that it fits its linears."""
        home, groups = builder.own(layer.home), len(state.kept)
        for name, units in layer.attributes:
            setattr(home, name, groups * units)
        self._adapter.finish(builder, layer, state.kept)
        check_fit(builder.root, layer, groups)

    def parts(
        self, stage: Denoiser, layer: PrunableLayer, kept: Mapping[str, torch.Tensor]
    ) -> Parts:
        """Collect a layer's tensors from a stage; what stays whole is put in the dense order.

        Args:
            stage: made by `build`, perhaps moved or cast since.
            layer: of the denoiser.
            kept: groups of every layer that is not whole in this stage.
        """
        module = stage.get_submodule(layer.home)
        stands = isinstance(module, StandIn)
        if layer.name not in kept and not any(p.parameter in self._runs for p in layer.pieces):
            return dense_parts(stage, layer)
        found: Parts = {}
        if stands:
            pairs = zip(layer.readers, module.biases(), strict=False)
            found |= {f"{r.module}.bias": b.detach() for r, b in pairs if b is not None}
        for piece in layer.pieces:
            if stands and piece.within(layer.home):
                continue
            tensor = _stage_parameter(stage, piece.parameter)
            if tensor is None:
                continue
            if piece.parameter in self._runs and piece.axis is not None:
                tensor = self._own_runs(tensor, layer, piece, kept)
            if piece.whole and layer.name in kept:
                order = layer.indices(piece, kept[layer.name], tensor.shape[0])
                tensor = torch.empty_like(tensor).index_copy_(0, order.to(tensor.device), tensor)
            found[piece.name] = tensor
        return found

    def _own_runs(
        self,
        tensor: torch.Tensor,
        layer: PrunableLayer,
        piece: Piece,
        kept: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        axis = piece.axis or 0
        found, cursor, shift = [], 0, 0
        for start, other, _, _ in self._runs[piece.parameter]:
            cursor = start - shift
            length = other.columns_of_groups
            if other.name in kept:
                length = len(kept[other.name]) * other.width
            shift += other.columns_of_groups - length
            if other.name == layer.name:
                found.append(tensor.narrow(axis, cursor, length))
        return found[0] if len(found) == 1 else torch.cat(found, axis)

    def positions(
        self, parameter: str, kept: Mapping[str, torch.Tensor], lengths: Sequence[int]
    ) -> tuple[int, torch.Tensor] | None:
        """Return where in the dense parameter what a stage holds of it lies.

        Args:
            parameter: of the denoiser.
            kept: groups of every layer that is not whole in the stage.
            lengths: shape of what the stage holds.

        Returns:
            The axis, and the indices along it in the stage's order; None where no layer's width
            touches the parameter.
        """
        pieces = self._pieces.get(parameter)
        if pieces is None:
            return None
        axis = pieces[0][1].axis or 0
        runs = self._runs.get(parameter)
        if runs is None:
            layer, piece = pieces[0]
            return axis, _indices(layer, piece, kept).flatten()
        found, cursor = [], 0
        for start, layer, piece, number in runs:
            found.append(torch.arange(cursor, start))
            offset = piece.starts[number] - number * layer.columns_of_groups
            found.append(_indices(layer, piece, kept)[number] + offset)
            cursor = start + layer.columns_of_groups
        rest = lengths[axis] - sum(len(part) for part in found)
        return axis, torch.cat([*found, torch.arange(cursor, cursor + rest)])


def _indices(layer: PrunableLayer, piece: Piece, kept: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return where in a whole piece the values of a stage are, a row a run."""
    count = len(piece.starts)
    length = count * layer.columns_of_groups
    if layer.name not in kept:
        return torch.arange(length).reshape(count, -1)
    return layer.indices(piece, kept[layer.name], length).reshape(count, -1)


def reader_biases(layer: PrunableLayer, state: LayerState) -> list[torch.Tensor | None]:
    """Return the biases of a layer's readers that a stage keeps."""
    return [state.parts.get(f"{reader.module}.bias") for reader in layer.readers]


def _projects(dense: Denoiser, name: str) -> bool:
    """Tell a linear or convolution from a norm."""
    weight = getattr(dense.get_submodule(name), "weight", None)
    return weight is not None and weight.ndim > 1


def _stage_parameter(stage: Denoiser, name: str) -> torch.Tensor | None:
    module, _, leaf = name.rpartition(".")
    owner = stage.get_submodule(module)
    if isinstance(owner, LeadingColumns):
        owner = owner.norm
    found = getattr(owner, leaf, None)
    return None if found is None else found.detach()
