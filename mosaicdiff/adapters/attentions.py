"""The usual attentions of diffusers' blocks, as declarations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .family import Heads, Inputs


@dataclass(frozen=True)
class AttentionClass:
    """Where a class of attention modules says how wide it is; the fields are those of `Heads`."""

    per_group: tuple[str, ...]
    per_column: tuple[str, ...]
    untouched: tuple[str, ...]

    def heads(self, name: str, **fields: Any) -> Heads:
        """Declare the heads of an attention of this class."""
        return Heads(
            name, per_group=self.per_group, per_column=self.per_column, untouched=self.untouched,
            **fields,
        )  # fmt: skip

    def self_attention(self, name: str, stream: str = "image", **fields: Any) -> Heads:
        """Declare an attention of one stream to itself."""
        return self.heads(
            name,
            writers=((stream, ("to_q", "to_k", "to_v")),),
            readers=((stream, "to_out.0"),),
            attends=((stream, stream),),
            **fields,
        )

    def cross_attention(
        self, name: str, keys: str = "text", beside: tuple[Inputs, ...] = (), **fields: Any
    ) -> Heads:
        """Declare an attention of the image to another stream, and to those beside it.

        Args:
            beside: further linears that make keys and values, by stream.
        """
        return self.heads(
            name,
            writers=(("image", ("to_q",)), (keys, ("to_k", "to_v")), *beside),
            readers=(("image", "to_out.0"),),
            attends=(("image", keys), *(("image", stream) for stream, _ in beside)),
            **fields,
        )

    def joint_attention(self, name: str = "attn") -> Heads:
        """Declare an attention of image and text together, each with projections of its own."""
        both = "image+text"
        return self.heads(
            name,
            writers=(
                ("image", ("to_q", "to_k", "to_v")),
                ("text", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ),
            readers=(("image", "to_out.0"), ("text", "to_add_out")),
            attends=((both, both),),
        )


#: diffusers' `Attention`. Some of its other integers are as large, and never change.
LEGACY = AttentionClass(
    per_group=("heads", "sliceable_head_dim"),
    per_column=("inner_dim", "inner_kv_dim"),
    untouched=(
        "query_dim", "out_dim", "out_context_dim", "cross_attention_dim", "added_kv_proj_dim",
        "use_bias", "use_linear_bias",
    ),
)  # fmt: skip
#: `FluxAttention` and `Flux2Attention`.
FLUX = AttentionClass(
    per_group=("heads",),
    per_column=("inner_dim",),
    untouched=("head_dim", "query_dim", "out_dim", "added_kv_proj_dim"),
)
#: `WanAttention`.
WAN = AttentionClass(
    per_group=("heads",),
    per_column=("inner_dim", "kv_inner_dim"),
    untouched=("added_kv_proj_dim", "cross_attention_dim_head"),
)
#: `LTXAttention`.
LTX = AttentionClass(
    per_group=("heads",),
    per_column=("inner_dim", "inner_kv_dim"),
    untouched=("head_dim", "query_dim", "cross_attention_dim", "out_dim"),
)
