"""Wan: all blocks' shifts, scales and gates at once, and what text and picture give to all.

Queries and keys are normed across heads, by diffusers' own modules: a stage without some heads
norms what it keeps by the statistic of all, and cuts afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn
from torch.nn import functional

from ..pack import BiasOnly
from .attention import FeedForward, refuse
from .fusion import Fusion
from .joint_attention import Rotary
from .once import OncePerCall
from .products import Joins, Place
from .shared import Part, Tables, shared_parts

#: Tokens of the text where a picture's come before it: diffusers counts on it.
TEXT_TOKENS = 512


def fuse_wan(model: Any, joins: Joins) -> Fusion:
    """Return the fused way to run a Wan or a stage of one."""
    fusion = Fusion()
    blocks = list(model.blocks)
    key = tuple(id(block.scale_shift_table) for block in blocks)
    tables: Tables = joins.shared(("tables", *key), lambda: Tables(blocks, wide=True))
    turned: OncePerCall = joins.shared(("rotary",), lambda: OncePerCall(_signed))
    fusion.once += [tables.once, turned]
    crossing = [b.attn2 for b in blocks if not isinstance(b.attn2, BiasOnly)]
    sources: list[tuple[str, str, Any]] = [("to_k", "to_v", None)]
    if crossing and crossing[0].add_k_proj is not None:
        sources = [("to_k", "to_v", _text_alone), ("add_k_proj", "add_v_proj", _picture_alone)]
    parts: list[list[Part]] = [[] for _ in crossing]
    for *names, part in sources if crossing else ():
        places: list[Place] = [(attention, name) for attention in crossing for name in names]
        found = shared_parts(places, joins, fusion, part)
        for mine, number in zip(parts, range(0, len(found), 2), strict=True):
            mine += found[number : number + 2]
    given = {id(attention): mine for attention, mine in zip(crossing, parts, strict=True)}
    for number, block in enumerate(blocks):
        fusion.forwards.append((block, _Block(block, number, tables, fusion).forward))
        if not isinstance(block.attn1, BiasOnly):
            _SelfAttention(block.attn1, joins, turned).install(fusion)
        if not isinstance(block.attn2, BiasOnly):
            _CrossAttention(block.attn2, given[id(block.attn2)]).install(fusion)
        if not isinstance(block.ffn, BiasOnly):
            fusion.forwards.append((block.ffn, FeedForward(block.ffn, fusion).forward))
    return fusion


def _text_alone(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, tokens.shape[1] - TEXT_TOKENS :]


def _picture_alone(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, : tokens.shape[1] - TEXT_TOKENS]


def _signed(cos: torch.Tensor, sin: torch.Tensor) -> Rotary:
    """Return cosines and sines as `_rotated` takes them: every other sine negative."""
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)


def _rotated(heads: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turn neighbouring channels by their position: (B, T, H, D) by (1, T, 1, D)."""
    cos, sin = rotary
    swapped = heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (heads * cos + swapped * sin).to(heads.dtype)


class _Attention:
    """What self- and cross-attention share."""

    def __init__(self, attention: Any) -> None:
        self._attention = attention
        self._norm_q, self._norm_k = attention.norm_q, attention.norm_k
        self._out = attention.to_out[0]

    def install(self, fusion: Fusion) -> None:
        """Say what this uses, and what it puts there."""
        attention: Any = self._attention
        fusion.forwards.append((attention, self.forward))
        fusion.processors.append((attention, attention.processor))
        fusion.hold(attention, "norm_q", "norm_k")
        fusion.hold(attention.to_out, "0")

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def _heads(self, part: torch.Tensor) -> torch.Tensor:
        return part.unflatten(2, (self._attention.heads, -1))

    def _mix(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        parallel: Any,
    ) -> torch.Tensor:
        """Attend, (B, T, H, D) to (B, T, H * D)."""
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            backend=self._attention.processor._attention_backend,
            parallel_config=parallel,
        ).flatten(2)


class _SelfAttention(_Attention):
    def __init__(self, attention: Any, joins: Joins, turned: OncePerCall) -> None:
        super().__init__(attention)
        self._turned = turned
        self._qkv = joins.linear([(attention, name) for name in ("to_q", "to_k", "to_v")])
        self._sizes = self._qkv.sizes

    def install(self, fusion: Fusion) -> None:
        """Say what this uses, and what it puts there."""
        super().install(fusion)
        fusion.products.append(self._qkv)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Rotary | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return what the attention would: (B, T, C) to (B, T, C)."""
        refuse({"encoder_hidden_states": encoder_hidden_states, **kwargs})
        parts = self._qkv(hidden_states).split(self._sizes, -1)
        query, key = self._heads(self._norm_q(parts[0])), self._heads(self._norm_k(parts[1]))
        if rotary_emb is not None:
            rotary = self._turned(*rotary_emb)
            query, key = _rotated(query, rotary), _rotated(key, rotary)
        parallel = self._attention.processor._parallel_config
        mixed = self._mix(query, key, self._heads(parts[2]), attention_mask, parallel)
        return self._out(mixed.type_as(query))


class _CrossAttention(_Attention):
    """Attention to the text, and to a picture beside it where there is one."""

    def __init__(self, attention: Any, parts: Sequence[Part]) -> None:
        super().__init__(attention)
        self._to_q = attention.to_q
        #: Keys and values of the text, then of the picture, and the norms of keys.
        self._sources = [(parts[0], parts[1], attention.norm_k)]
        if len(parts) > 2:
            self._sources.append((parts[2], parts[3], attention.norm_added_k))

    def install(self, fusion: Fusion) -> None:
        """Say what this uses, and what it puts there."""
        super().install(fusion)
        fusion.hold(self._attention, "to_q")
        if len(self._sources) > 1:
            fusion.hold(self._attention, "norm_added_k")

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Rotary | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return what the attention would: (B, T, C), (B, S, C) to (B, T, C)."""
        refuse({"attention_mask": attention_mask, "rotary_emb": rotary_emb, **kwargs})
        if encoder_hidden_states is None:
            raise ValueError(
                "optimize: cross attention must be given encoder_hidden_states. Call "
                "mosaicdiff.restore to run it without."
            )
        query = self._heads(self._norm_q(self._to_q(hidden_states)))
        total: Any = None
        for keys, values, norm in self._sources:
            key = self._heads(norm(keys(encoder_hidden_states)))
            value = self._heads(values(encoder_hidden_states))
            mixed = self._mix(query, key, value, None, None).type_as(query)
            total = mixed if total is None else total + mixed
        return self._out(total)


class _Block:
    def __init__(self, block: Any, number: int, tables: Tables, fusion: Fusion) -> None:
        self._block, self._number, self._tables = block, number, tables
        self._norm1, self._norm2, self._norm3 = fusion.hold(block, "norm1", "norm2", "norm3")
        self._own, self._cross, self._ff = fusion.hold(block, "attn1", "attn2", "ffn")

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: Rotary,
    ) -> torch.Tensor:
        """Run as `WanTransformerBlock.forward`."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self._vectors(temb)
        given = hidden_states
        if not isinstance(self._own, BiasOnly):
            given = _modulated(self._norm1, given, shift, scale)
        stream = _added(hidden_states, gate, self._own(given, None, None, rotary_emb))
        given = stream
        if not isinstance(self._cross, BiasOnly):
            given = self._norm2(stream.float()).type_as(stream)
        stream = stream + self._cross(given, encoder_hidden_states, None, None)
        given = stream
        if not isinstance(self._ff, BiasOnly):
            given = _modulated(self._norm3, stream, shift_ff, scale_ff)
        return _added(stream, gate_ff, self._ff(given))

    def _vectors(self, temb: torch.Tensor) -> Sequence[torch.Tensor]:
        if temb.ndim == 3:
            return self._tables(temb, self._number)
        # Of times by token: as large as the stream, so each block makes its own.
        table = self._block.scale_shift_table.unsqueeze(0) + temb.float()
        shift, scale, gate, shift_ff, scale_ff, gate_ff = table.unbind(2)
        return shift, 1 + scale, gate, shift_ff, 1 + scale_ff, gate_ff


def _modulated(
    norm: nn.LayerNorm, stream: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Norm, scale and shift in float32, as diffusers; return in the stream's type."""
    wide = stream.float()
    if shift.ndim == 1 and scale.dtype == wide.dtype:
        found = functional.layer_norm(wide, norm.normalized_shape, scale, shift, norm.eps)
    else:
        found = torch.addcmul(shift, norm(wide).to(scale.dtype), scale)
    return found.type_as(stream)


def _added(stream: torch.Tensor, gate: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Add a gated change in the gate's type, float32 or wider, (B, T, C)."""
    wide = gate.dtype
    return torch.addcmul(stream.float().to(wide), gate, change.to(wide)).type_as(stream)
