"""DiT: one embedder, one product for all modulations, one for queries, keys and values.

As diffusers ships it, every block of a DiT embeds timestep and label by itself and multiplies the
result by weights of its own: of 1342 operations of DiT-XL/2 a third. What the blocks compute from
the same numbers is computed once here, and what follows is written with fewer operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from torch.nn import functional

from ..adapters.dit import BiasOnlyBlock
from ..pack import BiasOnly
from .attention import FeedForward, SelfAttention
from .fusion import Fusion
from .products import EqualModules, JoinedLinear, Joins, group_equal
from .shared import modulated

#: Shift, scale and gate of attention, then of the FFN.
_PARTS = 6


class Modulation(NamedTuple):
    """What timestep and label do to one block, scales with one added.

    (B, 1, C) each, or (C,) of one sample.
    """

    shift_attention: torch.Tensor
    scale_attention: torch.Tensor
    gate_attention: torch.Tensor
    shift_ff: torch.Tensor
    scale_ff: torch.Tensor
    gate_ff: torch.Tensor


def fuse_dit(model: Any, joins: Joins) -> Fusion:
    """Return the fused way to run a DiT or a stage of one."""
    fused = _FusedDiT(model, joins)
    fusion = Fusion(forward=fused.forward, products=fused.products, equal=fused.equal)
    for block in model.transformer_blocks:
        kind: Any = _FusedBiases if isinstance(block, BiasOnlyBlock) else _FusedBlock
        fusion.forwards.append((block, kind(block, joins, fusion).forward))
    return fusion


class _Embedder:
    """Embed timestep and label once for blocks whose embedders are equal, and modulate them all.

    Args:
        embedder: diffusers' `CombinedTimestepLabelEmbeddings`.
        product: of the linears that follow it.
        blocks: how many of them are blocks' modulations; what follows these is returned as is.
    """

    def __init__(self, embedder: Any, product: JoinedLinear, blocks: int) -> None:
        self._embedder, self._product, self._blocks = embedder, product, blocks
        settings = embedder.time_proj
        half = settings.num_channels // 2
        device = embedder.timestep_embedder.linear_1.weight.device
        steps = torch.arange(half, dtype=torch.float32, device=device)
        self._frequencies = torch.exp(
            -math.log(10000) * steps / (half - settings.downscale_freq_shift)
        )

    def __call__(
        self, timestep: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
    ) -> tuple[Sequence[Modulation], Sequence[torch.Tensor]]:
        embedder = self._embedder
        times = self._sinusoid(timestep).to(dtype)
        embedded = embedder.timestep_embedder(times) + embedder.class_embedder(labels)
        out = self._product(functional.silu(embedded))
        width, last = embedded.shape[-1], self._blocks * _PARTS
        # Of one sample the rows are vectors, which broadcast and serve a norm as they are. The
        # rows are split in two calls, not block by block: views cost as much as small products.
        lead = () if len(out) == 1 else (len(out), 1)
        scales = 1 + out[:, : last * width].unflatten(1, (self._blocks, _PARTS, width))[:, :, 1::3]
        rows = out.reshape(*lead, -1).split(width, -1)
        scaled = scales.reshape(*lead, -1).split(width, -1)
        modulations = [
            Modulation(rows[i], scaled[j], rows[i + 2], rows[i + 3], scaled[j + 1], rows[i + 5])
            for i, j in zip(range(0, last, _PARTS), range(0, len(scaled), 2), strict=True)
        ]
        return modulations, rows[last:]

    def _sinusoid(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return diffusers' sinusoidal embedding, cosines first."""
        if self._frequencies.device != timestep.device:  # the model was moved
            self._frequencies = self._frequencies.to(timestep.device)
        angles = timestep[:, None].float() * self._frequencies
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class _FusedDiT:
    """Run a DiT whose blocks are told their modulation."""

    def __init__(self, model: Any, joins: Joins) -> None:
        self._model = model
        self._check(model)
        norms = [block.norm1 for block in model.transformer_blocks]
        groups = group_equal([norm.emb for norm in norms])
        self.products, self.equal = [], []
        self._embedders: list[_Embedder] = []
        #: For each block its embedder and its place among that embedder's blocks.
        self._places: list[tuple[int, int]] = [(0, 0)] * len(norms)
        for number, group in enumerate(groups):
            places: list[tuple[nn.Module, str]] = [(norms[i], "linear") for i in group]
            if number == 0:  # the output head is modulated by the first block's embedder
                places.append((model, "proj_out_1"))
            product = joins.linear(places)
            self.products.append(product)
            self._embedders.append(_Embedder(norms[group[0]].emb, product, len(group)))
            if len(group) > 1:
                self.equal.append(EqualModules([norms[i].emb for i in group]))
            for place, index in enumerate(group):
                self._places[index] = (number, place)

    @staticmethod
    def _check(model: Any) -> None:
        for block in model.transformer_blocks:
            if getattr(block, "_chunk_size", None) is not None:
                raise ValueError(
                    "optimize: the FFN must not be run in chunks. Call "
                    "disable_forward_chunking() first."
                )
        settings = model.transformer_blocks[0].norm1.emb.time_proj
        if not settings.flip_sin_to_cos or settings.scale != 1 or settings.num_channels % 2:
            raise ValueError(
                "optimize: the timestep embedding must be diffusers' own of DiT, but its settings "
                "were changed. Leave this model as it is."
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Run as `DiTTransformer2DModel.forward`."""
        if timestep is None or class_labels is None or cross_attention_kwargs:
            raise ValueError(
                "optimize: a DiT must be called with timestep and class_labels and without "
                "cross_attention_kwargs. Call mosaicdiff.restore to call it otherwise."
            )
        model = self._model
        stream = model.pos_embed(hidden_states)
        found = [embed(timestep, class_labels, stream.dtype) for embed in self._embedders]
        for block, (embedder, place) in zip(model.transformer_blocks, self._places, strict=True):
            stream = block(stream, modulation=found[embedder][0][place])
        shift, scale = found[0][1]
        stream = modulated(model.norm_out, stream, shift, 1 + scale)
        stream = model.proj_out_2(stream)
        rows, tokens, _ = stream.shape
        side, patch, channels = math.isqrt(tokens), model.patch_size, model.out_channels
        stream = stream.view(rows, side, side, patch, patch, channels)
        pixels = stream.permute(0, 5, 1, 3, 2, 4).reshape(
            rows, channels, side * patch, side * patch
        )
        return Transformer2DModelOutput(sample=pixels) if return_dict else (pixels,)


class _FusedBlock:
    """Run one block of attention and FFN, either of which may be nothing but a bias.

    Both are called as modules: hooks that are put on them later run.
    """

    def __init__(self, block: Any, joins: Joins, fusion: Fusion) -> None:
        self._norm1, self._norm3 = block.norm1.norm, block.norm3
        self._attention, self._ff = fusion.hold(block, "attn1", "ff")
        self._attends = not isinstance(self._attention, BiasOnly)
        self._feeds = not isinstance(self._ff, BiasOnly)
        if self._attends:
            attend = SelfAttention(self._attention, joins)
            attend.install(fusion)
            fusion.forwards.append((self._attention, attend.forward))
        if self._feeds:
            fusion.forwards.append((self._ff, FeedForward(self._ff, fusion).forward))

    def forward(self, hidden_states: torch.Tensor, modulation: Modulation) -> torch.Tensor:
        """Return the stream after the block, (B, T, C)."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation
        if self._attends:
            change = self._attention(modulated(self._norm1, hidden_states, shift, scale))
        else:
            change = _bias(self._attention, hidden_states)
        stream = torch.addcmul(hidden_states, gate, change)
        if self._feeds:
            change = self._ff(modulated(self._norm3, stream, shift_ff, scale_ff))
        else:
            change = _bias(self._ff, stream)
        return torch.addcmul(stream, gate_ff, change)


class _FusedBiases:
    """Run a block of which only gated biases are left."""

    def __init__(self, block: Any, joins: Joins, fusion: Fusion) -> None:
        self._attention, self._ff = fusion.hold(block, "attn1", "ff")

    def forward(self, hidden_states: torch.Tensor, modulation: Modulation) -> torch.Tensor:
        """Return the stream after the block, (B, T, C)."""
        bias = _bias(self._attention, hidden_states)
        stream = torch.addcmul(hidden_states, modulation.gate_attention, bias)
        return torch.addcmul(stream, modulation.gate_ff, _bias(self._ff, stream))


def _bias(stand_in: Any, like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros(1) if stand_in.bias is None else stand_in.bias
