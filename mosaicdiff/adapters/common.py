"""What the adapters of transformers share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..groups import Denoiser, PrunableLayer
from ..pack import Parts, StageBuilder, make_linear


def check_plain(denoiser: Denoiser, layers: Iterable[PrunableLayer]) -> None:
    """Refuse fused projections, LoRA, quantised layers and head counts that do not fit.

    Raises:
        ValueError: names the module.
    """
    for name, module in denoiser.named_modules():
        if getattr(module, "fused_projections", False):
            raise ValueError(
                f"prune: {name} must have its own q, k and v projections, but they are fused. "
                "Load the model again, prune, and fuse afterwards: unfuse_qkv_projections() "
                "leaves the fused copies behind."
            )
        if hasattr(module, "lora_A") or hasattr(module, "base_layer"):
            raise ValueError(
                f"prune: {name} must be a plain layer, but an adapter (LoRA) is loaded. "
                "Fuse it into the weights or unload it first."
            )
    for layer in layers:
        for linear in (*layer.writers, *layer.readers):
            kind = type(denoiser.get_submodule(linear))
            if kind is not nn.Linear:
                raise ValueError(
                    f"prune: {linear} must be torch.nn.Linear, got {kind.__name__}. "
                    "Prune before quantising."
                )
        check_width(denoiser, layer)


def check_width(denoiser: Denoiser, layer: PrunableLayer) -> None:
    """Hold `heads` to the projections: diffusers derives the head width from both, silently.

    Raises:
        ValueError: they do not fit.
    """
    if layer.kind != "heads":
        return
    heads = denoiser.get_submodule(layer.name).heads
    for writer in layer.writers:
        rows = denoiser.get_submodule(writer).weight.shape[0]
        if rows != heads * layer.width:
            raise ValueError(
                f"prune: {layer.name} must have {layer.width} rows a head, got {rows} rows of "
                f"{writer.rpartition('.')[2]} for {heads} heads. Was it pruned by other means?"
            )


def feed_forward_layer(name: str, module: Any, features: int, tokens: int) -> PrunableLayer:
    """Describe the neurons of a GELU `FeedForward` that `tokens` tokens of a sample go through."""
    return PrunableLayer(
        name=name,
        kind="neurons",
        readers=(f"{name}.net.2",),
        writers=(f"{name}.net.0.proj",),
        groups=module.net[2].in_features,
        width=1,
        cost=tokens * 2 * features,
    )


def replace_linears(builder: StageBuilder, layer: PrunableLayer, parts: Parts, groups: int) -> None:
    """Put smaller linears into a stage, and tell a legacy `Attention` how many heads are left."""
    for linear in (*layer.writers, *layer.readers):
        module = make_linear(parts[f"{linear}.weight"], parts.get(f"{linear}.bias"))
        builder.replace(linear, module)
    for name in layer.fixed:
        owner, _, leaf = name.rpartition(".")
        setattr(builder.own(owner), leaf, nn.Parameter(parts[name], requires_grad=False))
    if layer.kind == "heads":
        attention = builder.own(layer.name)
        attention.heads = attention.sliceable_head_dim = groups
        attention.inner_dim = attention.inner_kv_dim = groups * layer.width
    check_width(builder.root, layer)


def bias_parts(biases: dict[str, torch.Tensor | None]) -> Parts:
    """Collect the tensors of a layer of which only readers' biases are left."""
    return {f"{reader}.bias": bias.detach() for reader, bias in biases.items() if bias is not None}


def image_tokens(denoiser: Denoiser) -> int:
    """Return how many patches an image of the size that the denoiser was made for has."""
    return (denoiser.config.sample_size // denoiser.config.patch_size) ** 2


def linear_weights(module: nn.Module | None) -> int:
    """Count the weights of the linears of a module; none of None."""
    if module is None:
        return 0
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
