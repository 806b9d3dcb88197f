"""Blocks of two streams, image and text, modulated by one vector: SD3, SD3.5, FLUX.1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch

from ..adapters.joint import JointBiasOnly
from ..pack import BiasOnly
from .attention import FeedForward
from .fusion import Fusion
from .joint_attention import JointAttention
from .products import Joins, Place
from .shared import Modulations, modulated, shared_modulations

#: Vectors that an adaptive norm makes of the conditioning, and which of them are scales.
VECTORS: dict[str, tuple[int, tuple[int, ...]]] = {
    "AdaLayerNormZero": (6, (1, 4)),
    "SD35AdaLayerNormZeroX": (9, (1, 4, 7)),
    "AdaLayerNormZeroSingle": (3, (1,)),
    "AdaLayerNormContinuous": (2, (0,)),
}

_FF, _SECOND = 3, 6


def modulations_of(norms: Sequence[Any], joins: Joins, fusion: Fusion) -> Modulations:
    """Return what one vector does to these norms, in one product."""
    places: list[Place] = [(norm, "linear") for norm in norms]
    counts = [VECTORS[type(norm).__name__] for norm in norms]
    return shared_modulations(places, counts, joins, fusion)


class FinalNorm:
    """`AdaLayerNormContinuous`: scale and shift by vectors that were made with all others."""

    def __init__(self, norm: Any, modulations: Modulations) -> None:
        self._norm, self._modulations = norm.norm, modulations
        self._start = modulations.start(norm.linear)

    def forward(self, x: torch.Tensor, conditioning_embedding: torch.Tensor) -> torch.Tensor:
        """Return the normed tokens, (B, T, C)."""
        scale, shift = self._modulations(conditioning_embedding)[self._start : self._start + 2]
        return modulated(self._norm, x, shift, scale)


class Stream(NamedTuple):
    """What a block has for one stream: the place of its vectors, norms before attention and FFN."""

    start: int
    norm1: Any
    norm2: Any
    ff: Any


class JointBlock:
    """Run one block; any of its attentions and FFNs may be nothing but biases.

    Args:
        block: the module.
        modulations: of all blocks.
        fusion: that learns what is put where.
        attend: makes the fused way to run an attention.
        ffs: names of the block's FFNs, of the image and of the text.
        norms: for image and text where its vectors begin, and its norms.
    """

    def __init__(
        self,
        block: Any,
        modulations: Modulations,
        fusion: Fusion,
        attend: Callable[[Any], JointAttention],
        ffs: tuple[str, str],
        norms: Sequence[tuple[int, Any, Any]],
    ) -> None:
        self._modulations = modulations
        self._image, self._text = (
            Stream(*norm, getattr(block, ff)) for norm, ff in zip(norms, ffs, strict=True)
        )
        (self._attention,) = fusion.hold(block, "attn")
        fusion.hold(block, *(name for name in ffs if getattr(block, name) is not None))
        self._gone = isinstance(self._attention, JointBiasOnly)
        self._second = getattr(block, "attn2", None)
        self._ends = getattr(block, "context_pre_only", False)
        if not self._gone:
            attend(self._attention).install(fusion)
        if self._second is not None and not isinstance(self._second, BiasOnly):
            attend(self._second).install(fusion)
        for stream in (self._image, self._text):
            if stream.ff is not None and not isinstance(stream.ff, BiasOnly):
                fusion.forwards.append((stream.ff, FeedForward(stream.ff, fusion).forward))

    @classmethod
    def of_norms(
        cls,
        block: Any,
        modulations: Modulations,
        fusion: Fusion,
        attend: Callable[[Any], JointAttention],
    ) -> Self:
        """Make it of a block whose modulations are its norms' own."""
        # A block that is nothing but biases has no second norms.
        norms = [
            (modulations.start(norm.linear), norm.norm, getattr(block, after, None))
            for norm, after in ((block.norm1, "norm2"), (block.norm1_context, "norm2_context"))
        ]
        return cls(block, modulations, fusion, attend, ("ff", "ff_context"), norms)

    def run(
        self, image: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, **arguments: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return text and image after the block, (B, S, C) and (B, T, C).

        Args:
            arguments: of the attention.
        """
        vectors = self._modulations(temb)
        mine, other = vectors[self._image.start :], vectors[self._text.start :]
        if self._gone:
            change, change_text = self._attention(image, text)
        else:
            # Where the text ends, its norm has scale and shift in the other order.
            shift, scale = (other[1], other[0]) if self._ends else (other[0], other[1])
            change, change_text = self._attention(
                hidden_states=modulated(self._image.norm1, image, mine[0], mine[1]),
                encoder_hidden_states=modulated(self._text.norm1, text, shift, scale),
                **arguments,
            )
        stream = torch.addcmul(image, mine[2], change)
        if self._second is not None:
            given = image
            if not isinstance(self._second, BiasOnly):
                given = modulated(self._image.norm1, image, mine[_SECOND], mine[_SECOND + 1])
            stream = torch.addcmul(stream, mine[_SECOND + 2], self._second(given))
        stream = _after_ff(stream, self._image, mine)
        if self._ends:
            return None, stream
        return _after_ff(torch.addcmul(text, other[2], change_text), self._text, other), stream


def _after_ff(
    tokens: torch.Tensor, stream: Stream, vectors: Sequence[torch.Tensor]
) -> torch.Tensor:
    shift, scale, gate = vectors[_FF : _FF + 3]
    given = tokens
    if not isinstance(stream.ff, BiasOnly):
        given = modulated(stream.norm2, tokens, shift, scale)
    return torch.addcmul(tokens, gate, stream.ff(given))


def clipped(stream: torch.Tensor) -> torch.Tensor:
    """Keep what is in half precision finite, as diffusers does."""
    return stream.clip(-65504, 65504) if stream.dtype == torch.float16 else stream
