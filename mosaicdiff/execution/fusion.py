"""What fused execution puts in the place of a network's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .products import EqualModules, JoinedLinear

Forward = Callable[..., Any]


@dataclass
class Fusion:
    """The fused way to run one network.

    Args:
        forward: of the network itself; None is its own.
        forwards: modules inside, and what runs in the place of their own `forward`.
        products: that the forwards use.
        equal: modules of which one stands for all.
        held: modules that the forwards hold on to: owner, name there, module. One that is
            replaced (by an adapter's layer, say) must not be run on unnoticed.
    """

    forward: Forward | None = None
    forwards: list[tuple[nn.Module, Forward]] = field(default_factory=list)
    products: list[JoinedLinear] = field(default_factory=list)
    equal: list[EqualModules] = field(default_factory=list)
    held: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    def check_held(self) -> None:
        """Raise RuntimeError where a module that is held on to was replaced."""
        for owner, name, module in self.held:
            if owner._modules[name] is not module:
                raise RuntimeError(
                    f"optimize: {name} of {type(owner).__name__} must be the layer that was "
                    f"optimized, but {type(owner._modules[name]).__name__} is in its place. Call "
                    "mosaicdiff.restore before layers are replaced, and optimize after."
                )
