"""SD3 and SD3.5: one product for all modulations, and for what each stream gives to attention."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .attention import refuse
from .fusion import Fusion
from .joint import FinalNorm, JointBlock, modulations_of
from .joint_attention import JointAttention
from .products import Joins


def fuse_sd3(model: Any, joins: Joins) -> Fusion:
    """Return the fused way to run an SD3 or a stage of one."""
    fusion = Fusion()
    blocks = model.transformer_blocks
    if any(getattr(block, "_chunk_size", None) is not None for block in blocks):
        raise ValueError(
            "optimize: the FFN must not be run in chunks. Call disable_forward_chunking() first."
        )
    norms = [norm for block in blocks for norm in (block.norm1, block.norm1_context)]
    modulations = modulations_of([*norms, model.norm_out], joins, fusion)
    fusion.forwards.append((model.norm_out, FinalNorm(model.norm_out, modulations).forward))
    for block in blocks:
        fused = _Block.of_norms(
            block, modulations, fusion, functools.partial(JointAttention, joins=joins)
        )
        fusion.forwards.append((block, fused.forward))
    return fusion


class _Block(JointBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Run as `JointTransformerBlock.forward`."""
        refuse(joint_attention_kwargs or {})
        return self.run(hidden_states, encoder_hidden_states, temb)
