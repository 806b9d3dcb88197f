"""Blocks of two streams, image and text, modulated by one vector: SD3, SD3.5, FLUX.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..adapters.joint import JointBiasOnly
from ..pack import BiasOnly
from .attention import FeedForward
from .fusion import Fusion
from .joint_attention import JointAttention
from .products import Joins
from .shared import Modulations, modulated

#: Vectors that an adaptive norm makes of the conditioning, and which of them are scales.
VECTORS: dict[str, tuple[int, tuple[int, ...]]] = {
    "AdaLayerNormZero": (6, (1, 4)),
    "SD35AdaLayerNormZeroX": (9, (1, 4, 7)),
    "AdaLayerNormZeroSingle": (3, (1,)),
    "AdaLayerNormContinuous": (2, (0,)),
}

_ATTENTION, _FF, _SECOND = 0, 3, 6


def modulations_of(norms: Sequence[Any], joins: Joins, fusion: Fusion) -> Modulations:
    """Return what one vector does to these norms, in one product."""
    counts = [VECTORS[type(norm).__name__] for norm in norms]
    found: Modulations = joins.shared(
        ("modulations", *(id(norm.linear.weight) for norm in norms)),
        lambda: Modulations(norms, counts, joins),
    )
    fusion.products.append(found)
    fusion.once.append(found.once)
    return found


class FinalNorm:
    """`AdaLayerNormContinuous`: scale and shift by vectors that were made with all others."""

    def __init__(self, norm: Any, modulations: Modulations) -> None:
        self._norm, self._modulations = norm.norm, modulations
        self._start = modulations.start(norm)

    def forward(self, x: torch.Tensor, conditioning_embedding: torch.Tensor) -> torch.Tensor:
        """Return the normed tokens, (B, T, C)."""
        scale, shift = self._modulations(conditioning_embedding)[self._start : self._start + 2]
        return modulated(self._norm, x, shift, scale)


class JointBlock:
    """Run one block; any of its attentions and FFNs may be nothing but biases.

    Args:
        block: of a model with `norm1`, `norm1_context`, `attn`, `ff` and `ff_context`.
        attention: how a joint attention of it is run.
    """

    def __init__(
        self,
        block: Any,
        modulations: Modulations,
        joins: Joins,
        fusion: Fusion,
        attention: type[JointAttention],
        **options: Any,
    ) -> None:
        self._modulations = modulations
        self._image_at = modulations.start(block.norm1)
        self._text_at = modulations.start(block.norm1_context)
        self._norm1, self._norm1_text = block.norm1.norm, block.norm1_context.norm
        self._attention, self._ff = fusion.hold(block, "attn", "ff")
        self._gone = isinstance(self._attention, JointBiasOnly)
        # A block that is nothing but biases has no second norms.
        self._norm2 = getattr(block, "norm2", None)
        self._norm2_text = getattr(block, "norm2_context", None)
        self._second = getattr(block, "attn2", None)
        self._ff_text = block.ff_context
        self._ends = getattr(block, "context_pre_only", False)
        if not self._gone:
            attention(self._attention, joins, **options).install(fusion)
        if self._second is not None and not isinstance(self._second, BiasOnly):
            attention(self._second, joins, **options).install(fusion)
        for ff in (self._ff, self._ff_text):
            if ff is not None and not isinstance(ff, BiasOnly):
                fusion.forwards.append((ff, FeedForward(ff, fusion).forward))

    def run(
        self, image: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, **arguments: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return text and image after the block, (B, S, C) and (B, T, C).

        Args:
            arguments: of the attention.
        """
        vectors = self._modulations(temb)
        mine, other = vectors[self._image_at :], vectors[self._text_at :]
        if self._gone:
            change, change_text = self._attention(image, text)
        else:
            # Where the text ends, its norm has scale and shift in the other order.
            shift, scale = (other[1], other[0]) if self._ends else (other[0], other[1])
            change, change_text = self._attention(
                hidden_states=modulated(self._norm1, image, mine[0], mine[1]),
                encoder_hidden_states=modulated(self._norm1_text, text, shift, scale),
                **arguments,
            )
        stream = torch.addcmul(image, mine[2], change)
        if self._second is not None:
            given = image
            if not isinstance(self._second, BiasOnly):
                given = modulated(self._norm1, image, mine[_SECOND], mine[_SECOND + 1])
            stream = torch.addcmul(stream, mine[_SECOND + 2], self._second(given))
        stream = _after_ff(stream, self._ff, self._norm2, mine)
        if self._ends:
            return None, stream
        text = torch.addcmul(text, other[2], change_text)
        return _after_ff(text, self._ff_text, self._norm2_text, other), stream


def _after_ff(
    stream: torch.Tensor, ff: Any, norm: nn.Module | None, vectors: Sequence[torch.Tensor]
) -> torch.Tensor:
    shift, scale, gate = vectors[_FF : _FF + 3]
    given = stream
    if norm is not None and not isinstance(ff, BiasOnly):
        given = modulated(norm, stream, shift, scale)
    return torch.addcmul(stream, gate, ff(given))
