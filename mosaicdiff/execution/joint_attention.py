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
    """Norms of queries and of keys by head, of all streams at once.

    Their weights are copied side by side; `refresh` follows them.

    Args:
        streams: norms of queries and of keys, of each stream in its order: RMS norms with weights.
    """

    def __init__(self, streams: Sequence[tuple[Any, Any]]) -> None:
        self._norms = [norm for pair in streams for norm in pair]
        first = self._norms[0]
        for norm in self._norms:
            if not _plain_norm(norm) or (type(norm), norm.eps) != (type(first), first.eps):
                raise ValueError(
                    "optimize: queries and keys of all streams must be normed by one kind of "
                    f"RMSNorm with weights, or not at all, got {type(norm).__name__}. Leave this "
                    "model as it is."
                )
        #: diffusers takes the variance in float32 whatever it is given, torch does not.
        self._narrow, self._eps = isinstance(first, RMSNorm), first.eps
        self._weights: list[torch.Tensor] = []
        self._seen: list[tuple[int, int]] = []
        self.joined = 0
        #: The linears whose weights are read: none.
        self.places: list[tuple[nn.Module, str, Any]] = []

    def refresh(self) -> bool:
        """Copy the weights again where they were moved or written to; whether they were."""
        weights = [norm.weight for norm in self._norms]
        seen = [(weight.data_ptr(), weight._version) for weight in weights]
        if self._weights and seen == self._seen:
            return False
        pairs = zip(weights[::2], weights[1::2], strict=True)
        self._weights = [torch.stack([q.detach(), k.detach()])[:, None] for q, k in pairs]
        self._seen = seen
        self.joined += 1
        return True

    def release(self) -> None:
        """Let go of the copies."""
        self._weights = []

    def __call__(self, pair: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Norm queries and keys.

        Args:
            pair: (B, T, 2, H, D), streams one after the other.
            sizes: tokens of each stream.
        """
        if self._narrow and pair.dtype == torch.float64:
            variance = pair.to(torch.float32).pow(2).mean(-1, keepdim=True)
            normed = pair * torch.rsqrt(variance + self._eps)
        else:
            normed = functional.rms_norm(pair, pair.shape[-1:], None, self._eps)
        for part, weight in zip(normed.split(sizes, 1), self._weights, strict=True):
            part.mul_(weight)
        return normed


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
        pairs = [(attention.norm_q, attention.norm_k)]
        if attention.added_kv_proj_dim is not None:
            pairs.append((attention.norm_added_q, attention.norm_added_k))
        if self.text_first:
            pairs.reverse()
        norms = [norm for pair in pairs for norm in pair]
        self._norms: HeadNorms | None = None
        if any(norm is not None for norm in norms):
            # One for all stages with this attention: they run what was put there for the first.
            key = tuple(id(getattr(norm, "weight", None)) for norm in norms)
            self._norms = joins.shared(("norms", *key), lambda: HeadNorms(pairs))
        self._prepare(joins)

    def _prepare(self, joins: Joins) -> None:
        """Join the projections, and hold those of what attention returns."""
        attention = self._attention
        self._image = joins.linear([(attention, name) for name in _IMAGE])
        self._out = attention.to_out[0]
        self._text = self._text_out = None
        if attention.added_kv_proj_dim is not None:
            self._text = joins.linear([(attention, name) for name in _TEXT])
            if not attention.context_pre_only:
                self._text_out = attention.to_add_out

    def install(self, fusion: Fusion) -> None:
        """Say what this uses, and what it puts there."""
        attention = self._attention
        fusion.forwards.append((attention, self.forward))
        fusion.processors.append((attention, attention.processor))
        fusion.products += [p for p in (self._image, self._text, self._norms) if p is not None]
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
            query, key, value = self._heads(image, [image.shape[1]], image_rotary_emb)
            return self._out(self._mix(query, key, value, attention_mask))
        text = self._text(encoder_hidden_states).unflatten(-1, heads)
        streams = [text, image] if self.text_first else [image, text]
        sizes = [stream.shape[1] for stream in streams]
        query, key, value = self._heads(torch.cat(streams, 1), sizes, image_rotary_emb)
        found = self._mix(query, key, value, attention_mask).split(sizes, 1)
        mixed, ending = reversed(found) if self.text_first else found
        # Of several samples, torch multiplies what is not contiguous one sample after another.
        if self._text_out is not None:
            ending = self._text_out(ending.contiguous())
        return self._out(mixed.contiguous()), ending

    def _heads(
        self, parts: torch.Tensor, sizes: Sequence[int], rotary: Rotary | None
    ) -> Sequence[torch.Tensor]:
        """Return queries, keys and values, (B, T, H, D), of projections (B, T, 3, H, D)."""
        if self._norms is None and rotary is None:
            return parts.unbind(2)
        pair = parts[:, :, :2]
        if self._norms is not None:
            pair = self._norms(pair, sizes)
        if rotary is not None:
            pair = rotated(pair, self._signed(*rotary))
        query, key = pair.unbind(2)
        return query, key, parts[:, :, 2]

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
