"""Attention of image and text together, with one product for what each gives to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from torch import nn
from torch.nn import functional

from .attention import check_attention, mix, refuse
from .fusion import Fusion
from .once import OncePerCall
from .products import Joins

#: Cosines and sines of rotary embeddings, (T, D) each.
Rotary = tuple[torch.Tensor, torch.Tensor]

_IMAGE = ("to_q", "to_k", "to_v")
_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj")


class HeadNorms:
    """Norms of queries and of keys by head, both at once.

    Args:
        norms: of queries and of keys: RMS norms with weights, or None and None.
    """

    def __init__(self, norms: Sequence[Any]) -> None:
        self.present = norms[0] is not None
        if [norm is None for norm in norms] != [not self.present] * 2 or (
            self.present and not all(_plain_norm(norm) for norm in norms)
        ):
            kinds = ", ".join(type(norm).__name__ for norm in norms)
            raise ValueError(
                "optimize: queries and keys must both be normed by RMSNorm with weights, or "
                f"neither, got {kinds}. Leave this model as it is."
            )
        self._norms = norms
        #: diffusers takes the variance in float32 whatever it is given, torch does not.
        self._narrow = isinstance(norms[0], RMSNorm)
        self._eps: Any = norms[0].eps if self.present else None

    def __call__(self, pair: torch.Tensor) -> torch.Tensor:
        """Norm queries and keys, (B, T, 2, H, D)."""
        query, key = self._norms
        weight = torch.stack([query.weight, key.weight])[:, None]
        if self._narrow and pair.dtype == torch.float64:
            variance = pair.to(torch.float32).pow(2).mean(-1, keepdim=True)
            return pair * torch.rsqrt(variance + self._eps) * weight
        return functional.rms_norm(pair, pair.shape[-1:], None, self._eps) * weight


def _plain_norm(norm: Any) -> bool:
    plain = isinstance(norm, (RMSNorm, nn.RMSNorm)) and norm.weight is not None
    return plain and getattr(norm, "bias", None) is None and norm.weight.ndim == 1


def signed(cos: torch.Tensor, sin: torch.Tensor) -> Rotary:
    """Return cosines and sines, (T, D) each, as `rotated` takes them: every other sine negative."""
    even, odd = sin.unflatten(-1, (-1, 2)).unbind(-1)
    signs = torch.stack([-even, odd], -1).flatten(-2)
    return cos[:, None, None], signs[:, None, None]


def rotated(pair: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turn neighbouring channels by their position, as diffusers' `apply_rotary_emb` in float32.

    Args:
        pair: queries and keys, (B, T, 2, H, D).
        rotary: of `signed`.
    """
    cos, sin = rotary
    wide = pair.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(wide * cos, swapped, sin).to(pair.dtype)


class JointAttention:
    """diffusers' `Attention` with `JointAttnProcessor2_0`: the image first, then the text.

    Args:
        attention: of any number of heads.
        turned: where there are rotary embeddings, `signed`, once a call.
    """

    text_first = False

    def __init__(self, attention: Any, joins: Joins, turned: OncePerCall | None = None) -> None:
        check_attention(attention)
        self._attention, self._signed = attention, turned or OncePerCall(signed)
        self._image_norms = HeadNorms((attention.norm_q, attention.norm_k))
        self._prepare(joins)

    def _prepare(self, joins: Joins) -> None:
        """Join the projections, and hold those of what attention returns."""
        attention = self._attention
        self._image = joins.linear([(attention, name) for name in _IMAGE])
        self._out = attention.to_out[0]
        self._text = self._text_out = None
        if attention.added_kv_proj_dim is not None:
            self._text = joins.linear([(attention, name) for name in _TEXT])
            self._text_norms = HeadNorms((attention.norm_added_q, attention.norm_added_k))
            if not attention.context_pre_only:
                self._text_out = attention.to_add_out

    def install(self, fusion: Fusion) -> None:
        """Say what this uses, and what it puts there."""
        attention = self._attention
        fusion.forwards.append((attention, self.forward))
        fusion.processors.append((attention, attention.processor))
        fusion.products += [p for p in (self._image, self._text) if p is not None]
        fusion.hold(attention.to_out, "0")
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k", "to_add_out"):
            if attention._modules.get(norm) is not None:
                fusion.hold(attention, norm)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what the attention would, for the image or for image and text."""
        refuse(kwargs)
        heads = (3, self._attention.heads, -1)
        image = self._image(hidden_states).unflatten(-1, heads)
        if encoder_hidden_states is None or self._text is None:
            query, key, value = self._heads([(image, self._image_norms)], image_rotary_emb)
            return self._out(self._mix(query, key, value, attention_mask))
        text = self._text(encoder_hidden_states).unflatten(-1, heads)
        streams = [(image, self._image_norms), (text, self._text_norms)]
        sizes = [image.shape[1], text.shape[1]]
        if self.text_first:
            streams.reverse()
            sizes.reverse()
        query, key, value = self._heads(streams, image_rotary_emb)
        found = self._mix(query, key, value, attention_mask).split(sizes, 1)
        mixed, ending = reversed(found) if self.text_first else found
        # Of several samples, torch multiplies what is not contiguous one sample after another.
        if self._text_out is not None:
            ending = self._text_out(ending.contiguous())
        return self._out(mixed.contiguous()), ending

    def _heads(
        self, streams: Sequence[tuple[torch.Tensor, HeadNorms]], rotary: Rotary | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values of all streams, (B, T, H, D)."""
        if rotary is None and not any(norms.present for _, norms in streams):
            whole = streams[0][0] if len(streams) == 1 else torch.cat([s for s, _ in streams], 1)
            query, key, value = whole.unbind(2)
            return query, key, value
        pairs = [norms(s[:, :, :2]) if norms.present else s[:, :, :2] for s, norms in streams]
        values = [s[:, :, 2] for s, _ in streams]
        one = len(streams) == 1
        pair = pairs[0] if one else torch.cat(pairs, 1)
        if rotary is not None:
            pair = rotated(pair, self._signed(*rotary))
        query, key = pair.unbind(2)
        return query, key, values[0] if one else torch.cat(values, 1)

    def _mix(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        # As diffusers, which gives this processor no mask to use.
        return mix(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))


class FluxAttention(JointAttention):
    """diffusers' `FluxAttention`: the text first, rotary embeddings, a choice of backends."""

    text_first = True

    def _mix(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        processor = self._attention.processor
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        ).flatten(2)
