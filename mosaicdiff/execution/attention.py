"""Attention of one stream with one product for queries, keys and values, and the FFN."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from .fusion import Fusion
from .products import Joins
from .shared import Part


class SelfAttention:
    """Self-attention, without looking a processor's signature up.

    Args:
        attention: diffusers' `Attention`, of any number of heads.
    """

    def __init__(self, attention: Any, joins: Joins) -> None:
        check_attention(attention)
        self._attention = attention
        self._out = attention.to_out[0]
        self._qkv = joins.linear([(attention, name) for name in ("to_q", "to_k", "to_v")])

    def install(self, fusion: Fusion) -> None:
        """Say what this uses."""
        fusion.products.append(self._qkv)
        fusion.hold(self._attention.to_out, "0")
        fusion.processors.append((self._attention, self._attention.processor))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return what the attention would: (B, T, C) to (B, T, C)."""
        if encoder_hidden_states is not None:
            raise ValueError(
                "optimize: self-attention must not be given encoder_hidden_states. Call "
                "mosaicdiff.restore to run it so."
            )
        refuse(kwargs)
        attention = self._attention
        qkv = self._qkv(hidden_states).unflatten(-1, (3, attention.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if attention.norm_q is not None:
            query = attention.norm_q(query)
        if attention.norm_k is not None:
            key = attention.norm_k(key)
        return self._out(mix(query, key, value, attention_mask))


class CrossAttention:
    """Attention to another stream, whose keys and values are made for all layers at once.

    Args:
        attention: diffusers' `Attention`, of any number of heads.
        key: what the stream gives to this layer, made for all layers together.
        value: likewise.
    """

    def __init__(self, attention: Any, key: Part, value: Part) -> None:
        check_attention(attention)
        self._attention, self._key, self._value = attention, key, value
        self._to_q, self._out = attention.to_q, attention.to_out[0]

    def install(self, fusion: Fusion) -> None:
        """Say what this uses."""
        fusion.hold(self._attention, "to_q")
        fusion.hold(self._attention.to_out, "0")
        fusion.processors.append((self._attention, self._attention.processor))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return what the attention would: (B, T, C), (B, S, E) to (B, T, C)."""
        if encoder_hidden_states is None:
            raise ValueError(
                "optimize: cross attention must be given encoder_hidden_states. Call "
                "mosaicdiff.restore to run it without."
            )
        refuse(kwargs)
        attention = self._attention
        heads = (attention.heads, -1)
        query = self._to_q(hidden_states).unflatten(-1, heads).transpose(1, 2)
        key = self._key(encoder_hidden_states).unflatten(-1, heads).transpose(1, 2)
        value = self._value(encoder_hidden_states).unflatten(-1, heads)
        if attention.norm_q is not None:
            query = attention.norm_q(query)
        if attention.norm_k is not None:
            key = attention.norm_k(key)
        return self._out(mix(query, key, value.transpose(1, 2), attention_mask))


class FeedForward:
    """diffusers' `FeedForward` without its dropouts.

    Args:
        ff: of any number of neurons.
    """

    def __init__(self, ff: Any, fusion: Fusion) -> None:
        self._first, self._last = fusion.hold(ff.net, "0", "2")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what the layer would: (B, T, C) to (B, T, C)."""
        return self._last(self._first(hidden_states))


def mix(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return scaled dot-product attention, (B, H, T, D) to (B, T, H * D).

    Args:
        mask: added to the products, (B, 1 or T, S), as diffusers' models make it.
    """
    if mask is not None:
        if mask.ndim != 3 or len(mask) != len(query):
            raise ValueError(
                f"optimize: attention_mask must be ({len(query)}, 1, tokens), got "
                f"{tuple(mask.shape)}. Call mosaicdiff.restore to use it."
            )
        mask = mask[:, None]
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


def refuse(arguments: dict[str, Any]) -> None:
    """Refuse what only other processors of attention read.

    Raises:
        ValueError: names it.
    """
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(
            f"optimize: attention must be called without {', '.join(given)}, which its processor "
            "does not know. Leave it out, or call mosaicdiff.restore."
        )


def check_attention(attention: Any) -> None:
    """Refuse attention that does more than project, norm by head, mix and project.

    Raises:
        ValueError: names what it does besides.
    """
    found = [
        name
        for name in ("group_norm", "spatial_norm", "residual_connection", "norm_cross")
        if getattr(attention, name, None)
    ]
    if getattr(attention, "rescale_output_factor", 1.0) != 1.0:
        found.append("rescale_output_factor")
    if found:
        raise ValueError(
            f"optimize: attention must be without {', '.join(found)} to be fused. Leave this model "
            "as it is."
        )
