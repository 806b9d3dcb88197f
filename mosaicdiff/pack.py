"""Smaller dense layers, and the clones of containers that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .groups import Denoiser, PrunableLayer

#: Tensors of one layer of one stage by the names of its pieces.
Parts = dict[str, torch.Tensor]

#: Where accelerate and diffusers keep the hooks that bring weights to the device of a call.
_OFFLOADING = ("_hf_hook", "_diffusers_hook")


@dataclass(frozen=True)
class LayerState:
    """What one stage keeps of one layer: group indices (int64, CPU, sorted) and its tensors."""

    kept: torch.Tensor
    parts: Parts


class StandIn(nn.Module):
    """Stand for a layer of which nothing is left but the biases of its readers."""

    def biases(self) -> tuple[torch.Tensor | None, ...]:
        """Return the readers' biases, in the order of the layer's readers."""
        raise NotImplementedError


class BiasOnly(StandIn):
    """Stand for a layer of one reader of which nothing is left but the reader's bias.

    Exactly what attention with zero heads, or an FFN with zero neurons, would return.
    """

    def __init__(self, features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.features = features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def biases(self) -> tuple[torch.Tensor | None, ...]:
        return (self.bias,)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        shape = (*hidden_states.shape[:-1], self.features)
        if self.bias is None:
            return hidden_states.new_zeros(shape)
        return self.bias.expand(shape)


class LeadingColumns(nn.Module):
    """A norm across all groups of a layer, of whose output the first columns are wanted.

    The projections before it keep all their rows, those of the kept groups first: the norm's
    statistic is the dense layer's, and what is kept of its output is a view.
    """

    def __init__(self, norm: nn.Module, features: int, columns: int) -> None:
        super().__init__()
        self.norm, self.features, self.columns = norm, features, columns

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[-1] != self.features:
            raise ValueError(
                f"LeadingColumns: hidden_states must be {self.features} wide, got "
                f"{hidden_states.shape[-1]}. Projections around a norm across all heads cannot be "
                "fused once heads are gone: unfuse them, or prune with "
                "shared_norms='approximate'."
            )
        return self.norm(hidden_states)[..., : self.columns]


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Wrap existing tensors as a linear layer, without copying or initialising them."""
    with torch.device("meta"):  # of any size: torch warns where there is nothing to initialise
        linear = nn.Linear(1, 1, bias=bias is not None)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def resized(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a module like this one around tensors of another size, which are not copied.

    Args:
        module: a linear, a convolution, or a norm over the last dimension.
        tensors: its parameters by name; those left out stay.

    Raises:
        ValueError: the module is of another kind.
    """
    held: dict[str, Any] = dict(module.named_parameters(recurse=False))
    held |= tensors
    weight: Any = held.get("weight")
    if type(module) is nn.Linear:
        return make_linear(held["weight"], held.get("bias"))
    clone: Any = shallow_clone(module)
    for name, tensor in tensors.items():
        clone._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    if isinstance(clone, nn.Conv2d):
        clone.out_channels = weight.shape[0]
        # A depthwise convolution has a group a channel.
        depthwise = clone.groups > 1
        clone.groups = clone.out_channels if depthwise else 1
        clone.in_channels = weight.shape[1] * clone.groups
        return clone
    if weight is not None and weight.ndim == 1:
        for name in ("normalized_shape", "dim"):  # of torch's norms, of diffusers'
            if hasattr(clone, name):
                setattr(clone, name, type(getattr(clone, name))(weight.shape))
                return clone
    raise ValueError(
        f"prune: layers must be linears, convolutions or norms, got {type(module).__name__}."
    )


def shallow_clone(module: nn.Module) -> nn.Module:
    """Copy a module object that holds the same parameters, buffers and children.

    Its tables are its own, those of hooks too: a hook on the clone must not run on the original.
    Offloading and compilation put a call of the original into the object: the clone is without.
    """
    clone = module.__new__(type(module))
    clone.__dict__ = dict(module.__dict__)
    if any(name in clone.__dict__ for name in _OFFLOADING):
        for name in ("forward", "_old_forward", *_OFFLOADING):
            clone.__dict__.pop(name, None)
    clone.__dict__.pop("_compiled_call_impl", None)
    for name in nn.Module().__dict__:
        if isinstance(clone.__dict__.get(name), dict):
            clone.__dict__[name] = clone.__dict__[name].copy()
    return clone


def twin(module: nn.Module, made: dict[int, nn.Module] | None = None) -> nn.Module:
    """Copy the objects of a module tree around the same parameters and buffers, without hooks.

    Args:
        made: twins by the identity of their originals, where several trees share modules.
    """
    made = {} if made is None else made
    if id(module) not in made:
        clone: Any = shallow_clone(module)
        clone.__dict__.pop("forward", None)
        for name, value in clone.__dict__.items():
            if name.endswith("_hooks") and isinstance(value, dict):
                value.clear()
        made[id(module)] = clone
        for name, child in clone._modules.items():
            clone._modules[name] = None if child is None else twin(child, made)
    return made[id(module)]


def meta_copy(module: nn.Module) -> nn.Module:
    """Copy a module with its parameters and buffers on the meta device and without hooks."""
    clone: Any = shallow_clone(module)
    for name, value in clone.__dict__.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            value.clear()
    for table in (clone._parameters, clone._buffers):
        for name, tensor in table.items():
            if tensor is None:
                continue
            empty = torch.empty_like(tensor, device="meta")
            wrap = isinstance(tensor, nn.Parameter)
            table[name] = nn.Parameter(empty, requires_grad=False) if wrap else empty
    for name, child in clone._modules.items():
        clone._modules[name] = None if child is None else meta_copy(child)
    return clone


class StageBuilder:
    """Make one stage's denoiser from the dense one: only what is replaced is new.

    Containers on the way to a replaced module are cloned once; all other modules are the dense
    denoiser's own objects, so that several stages share them.
    """

    def __init__(self, dense: nn.Module) -> None:
        self.root: Denoiser = shallow_clone(dense)
        self._cloned: dict[str, nn.Module] = {"": self.root}

    def own(self, name: str) -> Denoiser:
        """Return the stage's own clone of the named module, made at need."""
        if name not in self._cloned:
            parent, _, leaf = name.rpartition(".")
            owner = self.own(parent)
            clone = shallow_clone(owner.get_submodule(leaf))
            owner._modules[leaf] = clone
            self._cloned[name] = clone
        return self._cloned[name]

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of the named one."""
        parent, _, leaf = name.rpartition(".")
        self.own(parent)._modules[leaf] = module
        self._cloned[name] = module


def dense_parts(denoiser: Denoiser, layer: PrunableLayer) -> Parts:
    """Collect a layer's tensors from the dense denoiser (biases where there are any)."""
    held = {n: p for m in layer.modules for n, p in _own_parameters(denoiser, m)}
    return {
        piece.name: layer.dense(piece, held[piece.parameter])
        for piece in layer.pieces
        if piece.parameter in held
    }


def _own_parameters(denoiser: Denoiser, name: str) -> list[tuple[str, torch.Tensor]]:
    module = denoiser.get_submodule(name)
    return [(f"{name}.{leaf}", p.detach()) for leaf, p in module.named_parameters(recurse=False)]


def narrow_parts(
    parts: Mapping[str, torch.Tensor], layer: PrunableLayer, groups: torch.Tensor
) -> Parts:
    """Cut every tensor of a layer down to some of the groups it holds."""
    pieces = {piece.name: piece for piece in layer.pieces}
    return {name: layer.narrow(pieces[name], tensor, groups) for name, tensor in parts.items()}
