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
    """

    forward: Forward | None = None
    forwards: list[tuple[nn.Module, Forward]] = field(default_factory=list)
    products: list[JoinedLinear] = field(default_factory=list)
    equal: list[EqualModules] = field(default_factory=list)
