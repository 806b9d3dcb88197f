"""Products of one input that many modules are given: made once a call, when the first asks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .fusion import Fusion
from .once import OncePerCall
from .products import JoinedLinear, Joins, Place


class SharedProduct:
    """Linears of modules that are all given the same tensor, in one product.

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
        self.product = joins.linear(places)
        self._sizes, self._before = self.product.sizes, before
        self.once = OncePerCall(self._compute)

    def _compute(self, given: torch.Tensor) -> Sequence[torch.Tensor]:
        if self._before is not None:
            given = self._before(given)
        return self.product(given).split(self._sizes, -1)


class Part:
    """The output of one linear of a shared product, (..., its features).

    Args:
        shared: that it is part of.
        index: which of its linears.
    """

    def __init__(self, shared: SharedProduct, index: int) -> None:
        self._shared, self._index = shared, index

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        """Return it, of what all its linears are given."""
        return self._shared.once(given)[self._index]


def shared_parts(
    places: Sequence[Place],
    joins: Joins,
    fusion: Fusion,
    before: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[Part]:
    """Return the outputs of linears that are all given the same tensor.

    Linears that the same stages run are one product, the same in all these stages: so no stage
    computes what it does not need, and no weight is held twice.

    Args:
        places: of the linears.
        before: applied to the tensor first.
    """
    found: dict[int, Part] = {}
    for group in joins.partition(places):
        mine = [places[index] for index in group]
        linears: list[Any] = [owner._modules[name] for owner, name in mine]
        key = tuple(id(linear.weight) for linear in linears)
        shared: SharedProduct = joins.shared(
            ("product", *key), functools.partial(SharedProduct, mine, joins, before)
        )
        fusion.products.append(shared.product)
        fusion.once.append(shared.once)
        found |= {index: Part(shared, number) for number, index in enumerate(group)}
    return [found[index] for index in range(len(places))]


class Modulations:
    """What a conditioning vector does to all norms of a network: shifts, scales and gates.

    Args:
        places: of linears of the activated vector, whose vectors are of one width.
        counts: how many vectors each makes, and which of them are scales: they get one added.
    """

    def __init__(
        self, places: Sequence[Place], counts: Sequence[tuple[int, tuple[int, ...]]], joins: Joins
    ) -> None:
        self._product: JoinedLinear = joins.linear(places)
        self._width = self._product.sizes[0] // counts[0][0]
        self._starts: dict[int, int] = {}
        scales: list[int] = []
        total = 0
        for (*_, linear), (count, raised) in zip(self._product.places, counts, strict=True):
            self._starts[id(linear.weight)] = total
            scales += [total + part for part in raised]
            total += count
        ones = torch.zeros(total, self._width)
        ones[scales] = 1
        self._ones = ones.flatten()
        self.once = OncePerCall(self._compute)
        self.refresh()

    def start(self, linear: Any) -> int:
        """Return where the vectors of a linear begin."""
        return self._starts[id(linear.weight)]

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


def shared_modulations(
    places: Sequence[Place],
    counts: Sequence[tuple[int, tuple[int, ...]]],
    joins: Joins,
    fusion: Fusion,
) -> Modulations:
    """Return the modulations of a network, the same of all its stages; see `Modulations`."""
    linears: list[Any] = [owner._modules[name] for owner, name in places]
    key = tuple(id(linear.weight) for linear in linears)
    found: Modulations = joins.shared(
        ("modulations", *key), lambda: Modulations(places, counts, joins)
    )
    fusion.products.append(found)
    fusion.once.append(found.once)
    return found


class Tables:
    """What a timestep does to all blocks that add a table of their own to it.

    Args:
        blocks: with a `scale_shift_table` (6, C) or (1, 6, C): shift, scale and gate of attention,
            then of the FFN.
        wide: whether what the timestep gives is taken in float32.
    """

    def __init__(self, blocks: Sequence[Any], wide: bool = False) -> None:
        self._blocks, self._wide = list(blocks), wide
        self.once = OncePerCall(self._compute)

    def __call__(self, times: torch.Tensor, block: int) -> Sequence[torch.Tensor]:
        """Return the six vectors of a block, (B, 1, C) each, or (C,) of one sample.

        Scales have one added.

        Args:
            times: what the timestep gives, (B, 6, C) or (B, 6 * C).
            block: which of them.
        """
        return self.once(times)[6 * block : 6 * block + 6]

    def _compute(self, times: torch.Tensor) -> Sequence[torch.Tensor]:
        tables = torch.stack([block.scale_shift_table for block in self._blocks])
        tables = tables.view(len(self._blocks), 6, -1)
        times = times.float() if self._wide else times
        sums = tables + times.reshape(len(times), 1, 6, -1)
        sums[:, :, 1::3] += 1
        if len(times) == 1:
            return sums.flatten(0, 2).unbind(0)
        return sums.flatten(1, 2)[:, :, None].unbind(1)


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
