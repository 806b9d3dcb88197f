"""Turn kept groups into smaller dense layers, sharing whatever did not change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .groups import Denoiser, PrunableLayer

#: Tensors of one layer of one stage by their names in the dense denoiser.
Parts = dict[str, torch.Tensor]

#: Where accelerate and diffusers keep the hooks that bring weights to the device of a call.
_OFFLOADING = ("_hf_hook", "_diffusers_hook")


class BiasOnly(nn.Module):
    """Stand for a layer of which nothing is left but the reader's bias.

    Exactly what attention with zero heads, or an FFN with zero neurons, would return.
    """

    def __init__(self, features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.features = features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        shape = (*hidden_states.shape[:-1], self.features)
        if self.bias is None:
            return hidden_states.new_zeros(shape)
        return self.bias.expand(shape)


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Wrap existing tensors as a linear layer, without copying or initialising them."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


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
    parts: Parts = {}
    for linear in (*layer.writers, *layer.readers):
        module = denoiser.get_submodule(linear)
        parts[f"{linear}.weight"] = module.weight.detach()
        if module.bias is not None:
            parts[f"{linear}.bias"] = module.bias.detach()
    for name in layer.fixed:
        parts[name] = denoiser.get_parameter(name).detach()
    return parts


def narrow_parts(
    parts: Mapping[str, torch.Tensor], layer: PrunableLayer, groups: torch.Tensor
) -> Parts:
    """Cut every tensor of a layer down to some of the groups it holds."""
    return {name: layer.narrow(name, tensor, groups) for name, tensor in parts.items()}
