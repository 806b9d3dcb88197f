"""PixArt: all blocks' shifts, scales and gates at once, and all keys and values of the text."""

from __future__ import annotations

from typing import Any

import torch

from ..pack import BiasOnly
from .attention import refuse
from .basic import fuse_blocks
from .fusion import Fusion
from .products import Joins
from .shared import Tables, modulated


def fuse_pixart(model: Any, joins: Joins) -> Fusion:
    """Return the fused way to run a PixArt or a stage of one."""
    fusion = Fusion()
    blocks = list(model.transformer_blocks)
    fuse_blocks(blocks, joins, fusion)
    key = tuple(id(block.scale_shift_table) for block in blocks)
    tables: Tables = joins.shared(("tables", *key), lambda: Tables(blocks))
    fusion.once.append(tables.once)
    for number, block in enumerate(blocks):
        fusion.forwards.append((block, _Block(block, number, tables, fusion).forward))
    return fusion


class _Block:
    def __init__(self, block: Any, number: int, tables: Tables, fusion: Fusion) -> None:
        self._number, self._tables = number, tables
        self._norm1, self._norm2 = fusion.hold(block, "norm1", "norm2")
        self._own, self._cross, self._ff = fusion.hold(block, "attn1", "attn2", "ff")

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Run as `BasicTransformerBlock.forward` with `ada_norm_single`."""
        refuse(cross_attention_kwargs or {})
        assert timestep is not None  # the model embeds it for every block
        vectors = self._tables(timestep, self._number)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = vectors
        given = hidden_states
        if not isinstance(self._own, BiasOnly):
            given = modulated(self._norm1, given, shift, scale)
        change = self._own(given, attention_mask=attention_mask)
        stream = torch.addcmul(hidden_states, gate, change)
        change = self._cross(
            stream,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
        )
        stream = given = change + stream
        if not isinstance(self._ff, BiasOnly):
            given = modulated(self._norm2, stream, shift_ff, scale_ff)
        return torch.addcmul(stream, gate_ff, self._ff(given))
