"""What many modules ask for within one call of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class OncePerCall:
    """Compute something of tensors once, however many modules ask for it.

    The first tensor is known by identity. The network lets go of it after each call: its values
    may be others in the next, and a CUDA graph must hold all that it replays.

    Args:
        compute: of the tensors.
    """

    def __init__(self, compute: Callable[..., Any]) -> None:
        self._compute = compute
        self._given: torch.Tensor | None = None
        self._found: Any = None

    def __call__(self, given: torch.Tensor, *others: torch.Tensor) -> Any:
        """Return what is computed of a tensor, and of others that go with it."""
        if self._given is not given:
            self._found = self._compute(given, *others)
            self._given = given
        return self._found

    def clear(self) -> None:
        """Let go of the tensor and of what was computed."""
        self._given = self._found = None
