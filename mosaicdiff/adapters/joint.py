"""Blocks of two streams, image and text (`JointTransformerBlock`): stand-ins, and what they add."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..groups import Denoiser, PrunableLayer
from ..pack import BiasOnly, StandIn

#: Called with the name of a layer or block, a stream before it, and what it adds.
Add = Callable[[str, torch.Tensor, torch.Tensor], None]


class JointBiasOnly(StandIn):
    """Stand for joint attention without heads: the biases of the two readers.

    Exactly what `JointAttnProcessor2_0` would return. In a block whose text stream ends there is
    no second reader: as there, what comes second is the text's heads, of which there are none.
    """

    def __init__(self, image: BiasOnly, context: BiasOnly | None) -> None:
        super().__init__()
        self.image, self.context = image, context

    def biases(self) -> tuple[torch.Tensor | None, ...]:
        return self.image.bias, None if self.context is None else self.context.bias

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.context is None:
            text = encoder_hidden_states.new_zeros((*encoder_hidden_states.shape[:-1], 0))
        else:
            text = self.context(encoder_hidden_states)
        return self.image(hidden_states), text


def joint_stand_in(
    stage: Denoiser, layer: PrunableLayer, biases: Sequence[torch.Tensor | None]
) -> JointBiasOnly:
    """Return what stands for a joint attention without heads."""
    left = [
        BiasOnly(stage.get_submodule(reader.module).weight.shape[0], bias)
        for reader, bias in zip(layer.readers, biases, strict=True)
    ]
    return JointBiasOnly(left[0], left[1] if len(left) > 1 else None)


class NoHeads(StandIn):
    """Stand for an attention without heads that leaves its output linear to the block.

    It returns no columns: for what it is given alone, or for it and for the text beside it.
    """

    def biases(self) -> tuple[torch.Tensor | None, ...]:
        return ()

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        image = hidden_states[..., :0]
        if encoder_hidden_states is None:
            return image
        return image, encoder_hidden_states[..., :0]


class JointBiasOnlyBlock(nn.Module):
    """Stand for a block whose attentions and FFNs are gone: their gated biases, nothing more.

    Exactly what the block would return, without its norms over the tokens.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.context_pre_only = block.context_pre_only  # read by the model
        self.attn2 = self.ff_context = None  # where the block has none
        for name, child in block.named_children():
            setattr(self, name, child)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        parts: Any = self
        # Chunks of AdaLN: shift, scale and gate of attention, of the FFN, of a second attention.
        chunks = _modulation(parts.norm1, temb)
        layers = [(2, parts.attn.image), (5, parts.ff)]
        if len(chunks) == 9:
            layers.insert(1, (8, parts.attn2))
        image = _add_biases(hidden_states, chunks, layers)
        if self.context_pre_only:
            return None, image
        layers = [(2, parts.attn.context), (5, parts.ff_context)]
        return _add_biases(
            encoder_hidden_states, _modulation(parts.norm1_context, temb), layers
        ), image


def _modulation(norm: Any, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the chunks of an AdaLN-Zero, six of them or nine."""
    values = norm.linear(norm.silu(temb))
    return values.chunk(norm.linear.out_features // temb.shape[-1], dim=1)


def _add_biases(
    stream: torch.Tensor, chunks: tuple[torch.Tensor, ...], layers: list[tuple[int, BiasOnly]]
) -> torch.Tensor:
    for gate, layer in layers:
        if layer.bias is not None:  # called, so that hooks that bring weights run
            stream = stream + chunks[gate][:, None] * layer(stream[:, :1])
    return stream


def watch_streams(block: Any, name: str, add: Add) -> ExitStack:
    """Report what a block and its layers add to both streams; see `Adapter.watch_block`."""
    watch, stack = _Watch(name, add), ExitStack()
    for handle in watch.hooks(block):
        stack.callback(handle.remove)
    return stack


class _Watch:
    """Follow one block's two streams, and report what each layer adds to them."""

    def __init__(self, name: str, add: Add) -> None:
        self._name, self._add = name, add
        self._start: dict[str, torch.Tensor] = {}
        self._total: dict[str, torch.Tensor] = {}
        self._stream: dict[str, torch.Tensor] = {}
        self._gates: dict[tuple[str, str], torch.Tensor] = {}

    def hooks(self, block: Any) -> Iterator[Any]:
        yield block.register_forward_pre_hook(self._enter, with_kwargs=True)
        yield block.norm1.register_forward_hook(self._image_gates)
        yield block.attn.register_forward_hook(self._joint)
        if block.attn2 is not None:
            yield block.attn2.register_forward_hook(self._alone("attn2", "image"))
        yield block.ff.register_forward_hook(self._alone("ff", "image"))
        if not block.context_pre_only:
            yield block.norm1_context.register_forward_hook(self._text_gates)
            yield block.ff_context.register_forward_hook(self._alone("ff_context", "text"))
        yield block.register_forward_hook(self._leave)

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
        self._start = {"image": given["hidden_states"], "text": given["encoder_hidden_states"]}
        self._stream, self._total, self._gates = dict(self._start), {}, {}

    def _image_gates(self, norm: nn.Module, args: tuple, output: tuple) -> None:
        self._gates["attn", "image"], self._gates["ff", "image"] = output[1], output[4]
        if len(output) > 5:
            self._gates["attn2", "image"] = output[6]

    def _text_gates(self, norm: nn.Module, args: tuple, output: tuple) -> None:
        self._gates["attn", "text"], self._gates["ff_context", "text"] = output[1], output[4]

    def _change(self, layer: str, stream: str, output: torch.Tensor) -> None:
        change = self._gates[layer, stream][:, None] * output
        self._add(f"{self._name}.{layer}", self._stream[stream], change)
        self._stream[stream] = self._stream[stream] + change
        self._total[stream] = self._total[stream] + change if stream in self._total else change

    def _joint(self, attention: nn.Module, args: tuple, output: tuple) -> None:
        for stream, value in zip(("image", "text"), output, strict=True):
            if ("attn", stream) in self._gates:  # the last block's text goes nowhere
                self._change("attn", stream, value)

    def _alone(self, layer: str, stream: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            self._change(layer, stream, output)

        return leave

    def _leave(self, block: nn.Module, args: tuple, output: tuple) -> None:
        for stream, change in self._total.items():
            self._add(self._name, self._start[stream], change)
