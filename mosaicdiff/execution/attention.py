"""Attention of diffusers' `Attention` class with one product for queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from .fusion import Fusion
from .products import Joins


class SelfAttention:
    """Self-attention without masks, and without looking a processor's signature up.

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
        fusion.held.append((self._attention.to_out, "0", self._out))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what the attention would: (B, T, C) to (B, T, C)."""
        attention = self._attention
        rows, tokens = hidden_states.shape[:2]
        heads = attention.heads
        qkv = self._qkv(hidden_states).view(rows, tokens, 3, heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if attention.norm_q is not None:
            query = attention.norm_q(query)
        if attention.norm_k is not None:
            key = attention.norm_k(key)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self._out(mixed.transpose(1, 2).reshape(rows, tokens, -1))


def check_attention(attention: Any) -> None:
    """Refuse attention that does more than project, norm by head, mix and project.

    Raises:
        ValueError: names what it does besides.
    """
    found = [
        name
        for name in ("group_norm", "spatial_norm", "residual_connection")
        if getattr(attention, name, None)
    ]
    if getattr(attention, "rescale_output_factor", 1.0) != 1.0:
        found.append("rescale_output_factor")
    if found:
        raise ValueError(
            f"optimize: attention must be without {', '.join(found)} to be fused. Leave this model "
            "as it is."
        )
