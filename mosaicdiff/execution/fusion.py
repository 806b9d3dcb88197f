"""What fused execution puts in the place of a network's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .once import OncePerCall
from .products import EqualModules

Forward = Callable[..., Any]


@dataclass
class Fusion:
    """The fused way to run one network.

    Args:
        forward: of the network itself; None is its own.
        forwards: modules inside, and what runs in the place of their own `forward`.
        products: joined linears that the forwards use, and what is made of such.
        equal: modules of which one stands for all.
        held: modules that the forwards hold on to: owner, name there, module. One that is
            replaced (by an adapter's layer, say) must not be run on unnoticed.
        processors: attentions, and the processors in whose place something runs.
        once: what is computed once a call, and let go after it.
        left: what of the network is run as it is although others of its kind are fused, and why.
    """

    forward: Forward | None = None
    forwards: list[tuple[nn.Module, Forward]] = field(default_factory=list)
    products: list[Any] = field(default_factory=list)
    equal: list[EqualModules] = field(default_factory=list)
    held: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    processors: list[tuple[Any, Any]] = field(default_factory=list)
    once: list[OncePerCall] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def hold(self, owner: Any, *names: str) -> list[Any]:
        """Return children of a module, and notice when they are replaced."""
        found = [owner._modules[name] for name in names]
        self.held += [(owner, name, module) for name, module in zip(names, found, strict=True)]
        return found

    def check_held(self) -> None:
        """Raise RuntimeError where a module that is held on to was replaced."""
        for owner, name, module in self.held:
            if owner._modules[name] is not module:
                raise RuntimeError(
                    f"optimize: {name} of {type(owner).__name__} must be the layer that was "
                    f"optimized, but {type(owner._modules[name]).__name__} is in its place. Call "
                    "mosaicdiff.restore before layers are replaced, and optimize after."
                )
        for attention, processor in self.processors:
            if attention.processor is not processor:
                raise RuntimeError(
                    "optimize: attention must keep the processor it was optimized with, but "
                    f"{type(attention.processor).__name__} was set. Call mosaicdiff.restore before "
                    "processors are changed, and optimize after."
                )
