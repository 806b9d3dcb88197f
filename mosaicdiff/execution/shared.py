"""Products of one input that many modules are given: made once a call, when the first asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .products import JoinedLinear, Joins, Place


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


class SharedProducts:
    """Linears of modules that are all given the same tensor.

    Linears that the same stages run are one product; so no stage computes what it does not need,
    and no weight is held twice.

    Args:
        places: of the linears.
        before: applied to the tensor first.
    """

    def __init__(
        self,
        places: Sequence[Place],
        joins: Joins,
        before: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        groups = joins.partition(places)
        self.products = [joins.linear([places[i] for i in group]) for group in groups]
        self._sizes = [product.sizes for product in self.products]
        linears: list[Any] = [owner._modules[name] for owner, name in places]
        #: Where in the list of all outputs that of a linear is.
        self.index = {id(linears[i]): n for n, i in enumerate(sum(groups, []))}
        self._before = before
        self.once = OncePerCall(self._compute)

    def __call__(self, given: torch.Tensor, index: int) -> torch.Tensor:
        """Return the output of one linear, (..., its features)."""
        return self.once(given)[index]

    def _compute(self, given: torch.Tensor) -> list[torch.Tensor]:
        if self._before is not None:
            given = self._before(given)
        return [
            part
            for product, sizes in zip(self.products, self._sizes, strict=True)
            for part in product(given).split(sizes, -1)
        ]


class Modulations:
    """What a conditioning vector does to all norms of a network: shifts, scales and gates.

    Args:
        norms: diffusers' adaptive norms with a `linear` of the activated vector, of one width.
        counts: how many vectors each makes, and which of them are scales: they get one added.
    """

    def __init__(
        self, norms: Sequence[Any], counts: Sequence[tuple[int, tuple[int, ...]]], joins: Joins
    ) -> None:
        self._product: JoinedLinear = joins.linear([(norm, "linear") for norm in norms])
        self._width = norms[0].linear.out_features // counts[0][0]
        self._starts: dict[int, int] = {}
        scales: list[int] = []
        total = 0
        for norm, (count, raised) in zip(norms, counts, strict=True):
            self._starts[id(norm)] = total
            scales += [total + part for part in raised]
            total += count
        ones = torch.zeros(total, self._width)
        ones[scales] = 1
        self._ones = ones.flatten()
        self.once = OncePerCall(self._compute)
        self.refresh()

    def start(self, norm: nn.Module) -> int:
        """Return where the vectors of a norm begin."""
        return self._starts[id(norm)]

    @property
    def places(self) -> list[tuple[nn.Module, str, Any]]:
        """Owner, name and module of each linear."""
        return self._product.places

    @property
    def joined(self) -> int:
        """How often the weights were joined."""
        return self._product.joined

    def refresh(self) -> bool:
        """Follow the weights; see `JoinedLinear.refresh`."""
        changed = self._product.refresh()
        weight: Any = self._product.weight
        if (self._ones.device, self._ones.dtype) != (weight.device, weight.dtype):
            self._ones = self._ones.to(weight)
        return changed

    def release(self) -> None:
        """Let go of the joined tensors."""
        self._product.release()

    def __call__(self, embedded: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the vectors of all norms, (B, 1, C) each, or (C,) of one sample.

        Args:
            embedded: (B, C), before the activation.
        """
        return self.once(embedded)

    def _compute(self, embedded: torch.Tensor) -> Sequence[torch.Tensor]:
        out = self._product(functional.silu(embedded)) + self._ones
        # Of one sample the rows are vectors, which broadcast and serve a norm as they are.
        flat = out.reshape(-1) if len(out) == 1 else out[:, None]
        return flat.split(self._width, -1)


def modulated(
    norm: nn.Module, stream: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Norm the tokens, then scale and shift them by sample.

    Args:
        norm: over the last dimension.
        stream: (B, T, C).
        shift: (B, 1, C), or (C,) of one sample.
        scale: likewise, one added.
    """
    if shift.ndim == 1 and type(norm) is nn.LayerNorm and not norm.elementwise_affine:
        # Of one sample, that is what the norm itself does: one operation instead of two.
        return functional.layer_norm(stream, norm.normalized_shape, scale, shift, norm.eps)
    return torch.addcmul(shift, norm(stream), scale)
