"""FLUX.1: one product for all modulations, and in a parallel block for attention and FFN."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..adapters.joint import NoHeads
from .attention import refuse
from .fusion import Fusion
from .joint import FinalNorm, JointBlock, clipped, modulations_of
from .joint_attention import FluxAttention, Rotary, signed
from .once import OncePerCall
from .products import Joins, Place
from .shared import Modulations, modulated


def fuse_flux(model: Any, joins: Joins) -> Fusion:
    """Return the fused way to run a FLUX.1 or a stage of one."""
    fusion = Fusion()
    blocks, singles = model.transformer_blocks, model.single_transformer_blocks
    norms = [norm for block in blocks for norm in (block.norm1, block.norm1_context)]
    norms += [block.norm for block in singles]
    modulations = modulations_of([*norms, model.norm_out], joins, fusion)
    turned: OncePerCall = joins.shared(("rotary",), lambda: OncePerCall(signed))
    fusion.once.append(turned)
    fusion.forwards.append((model.norm_out, FinalNorm(model.norm_out, modulations).forward))
    attend = functools.partial(FluxAttention, joins=joins, turned=turned)
    for block in blocks:
        double = _Block.of_norms(block, modulations, fusion, attend)
        fusion.forwards.append((block, double.forward))
    for block in singles:
        single = _SingleBlock(block, modulations, joins, fusion, turned)
        fusion.forwards.append((block, single.forward))
    return fusion


class _Block(JointBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Run as `FluxTransformerBlock.forward`."""
        text, image = self.run(
            hidden_states,
            encoder_hidden_states,
            temb,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        return None if text is None else clipped(text), image


class _Projected(FluxAttention):
    """Attention of a parallel block, which is given its queries, keys and values."""

    def _prepare(self, joins: Joins) -> None:
        """Join nothing: the block does, together with its FFN."""

    def install(self, fusion: Fusion) -> None:
        """Say what this uses, and what it puts there."""
        attention = self._attention
        fusion.forwards.append((attention, self.forward))
        fusion.processors.append((attention, attention.processor))
        fusion.hold(attention, "norm_q", "norm_k")
        fusion.products.append(self._norms)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        image_rotary_emb: Rotary | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the heads side by side, (B, T, H * D), of projections (B, T, 3 * H * D)."""
        refuse(kwargs)
        parts = hidden_states.unflatten(-1, (3, self._attention.heads, -1))
        query, key, value = self._heads(parts, [parts.shape[1]], image_rotary_emb)
        return self._mix(query, key, value, attention_mask)


class _SingleBlock:
    """Run a block whose attention and FFN are given the same tokens, and read together."""

    def __init__(
        self,
        block: Any,
        modulations: Modulations,
        joins: Joins,
        fusion: Fusion,
        turned: OncePerCall,
    ) -> None:
        self._modulations, self._at = modulations, modulations.start(block.norm.linear)
        self._norm = block.norm.norm
        self._attention, self._activation, self._out = fusion.hold(
            block, "attn", "act_mlp", "proj_out"
        )
        writers: list[Place] = (
            []
            if isinstance(self._attention, NoHeads)
            else [(self._attention, name) for name in ("to_q", "to_k", "to_v")]
        )
        neurons: Place = (block, "proj_mlp")
        #: Columns of the projections that are attention's.
        self._columns = 3 * self._attention.to_q.out_features if writers else 0
        # One product, unless some stage shares one of the two layers and not the other.
        one = len(joins.partition([*writers, neurons])) == 1
        parts = [[*writers, neurons]] if one else [writers, [neurons]]
        self._products = [joins.linear(places) for places in parts]
        fusion.products += self._products
        if writers:
            _Projected(self._attention, joins, turned).install(fusion)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run as `FluxSingleTransformerBlock.forward`."""
        sizes = [encoder_hidden_states.shape[1], hidden_states.shape[1]]
        stream = torch.cat([encoder_hidden_states, hidden_states], 1)
        shift, scale, gate = self._modulations(temb)[self._at : self._at + 3]
        normed = modulated(self._norm, stream, shift, scale)
        projected = [product(normed) for product in self._products]
        if len(projected) == 1 and self._columns:
            columns = self._columns
            projected = [projected[0][..., :columns], projected[0][..., columns:]]
        read = self._activation(projected[-1])
        if self._columns:
            heads = self._attention(
                hidden_states=projected[0],
                image_rotary_emb=image_rotary_emb,
                **(joint_attention_kwargs or {}),
            )
            read = torch.cat([heads, read], -1)
        stream = clipped(torch.addcmul(stream, gate, self._out(read)))
        text, image = stream.split(sizes, 1)
        return text, image
