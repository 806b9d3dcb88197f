"""Blocks of self-attention, attention to one text, and FFN of diffusers."""

from __future__ import annotations

from typing import Any

from ..pack import BiasOnly
from .attention import CrossAttention, FeedForward, SelfAttention
from .fusion import Fusion
from .products import Joins, Place
from .shared import shared_parts


def fuse_blocks(blocks: list[Any], joins: Joins, fusion: Fusion) -> None:
    """Fuse transformer blocks of self-attention, attention to one text, and FFN."""
    crossing = [
        b.attn2 for b in blocks if b.attn2 is not None and not isinstance(b.attn2, BiasOnly)
    ]
    places: list[Place] = [(a, name) for a in crossing for name in ("to_k", "to_v")]
    parts = shared_parts(places, joins, fusion)
    text = {id(a): parts[2 * i : 2 * i + 2] for i, a in enumerate(crossing)}
    for block in blocks:
        _check(block)
        own, cross, ff = fusion.hold(block, "attn1", "attn2", "ff")
        layers: list[Any] = []
        if not isinstance(own, BiasOnly):
            layers.append((own, SelfAttention(own, joins)))
        if id(cross) in text:
            layers.append((cross, CrossAttention(cross, *text[id(cross)])))
        for module, fused in layers:
            fused.install(fusion)
            fusion.forwards.append((module, fused.forward))
        if not isinstance(ff, BiasOnly):
            fusion.forwards.append((ff, FeedForward(ff, fusion).forward))


def _check(block: Any) -> None:
    if block.only_cross_attention:
        raise ValueError(
            "optimize: attn1 must be self-attention, but this block attends to the text twice. "
            "Leave this model as it is."
        )
    if block._chunk_size is not None:
        raise ValueError(
            "optimize: the FFN must not be run in chunks. Call disable_forward_chunking() first."
        )
