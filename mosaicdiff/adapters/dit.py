"""DiT: `DiTTransformer2DModel`, class-conditional."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..groups import Denoiser, Macs, PrunableLayer, WeightTarget, shared_input
from ..pack import BiasOnly, Parts, StageBuilder, dense_parts
from .base import Adapter
from .common import (
    bias_parts,
    check_plain,
    feed_forward_layer,
    image_tokens,
    linear_weights,
    replace_linears,
)


class BiasOnlyBlock(nn.Module):
    """Stand for a block whose attention and FFN are gone: their gated biases, nothing more.

    Exactly what the block would return, without its norms over the tokens.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        norm: Any = self.norm1
        biases = [getattr(part, "bias", None) for part in (self.attn1, self.ff)]
        if biases[0] is None and biases[1] is None:
            return hidden_states
        emb = norm.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        _, _, gate_attn, _, _, gate_ff = norm.linear(norm.silu(emb)).chunk(6, dim=1)
        for gate, bias in zip((gate_attn, gate_ff), biases, strict=True):
            if bias is not None:
                hidden_states = hidden_states + gate[:, None] * bias
        return hidden_states


class DiTAdapter(Adapter):
    """Remove heads of self-attention and GELU neurons from every block."""

    denoiser_class = "DiTTransformer2DModel"
    timestep_argument = ("timestep", 1)
    condition = {"labels": "class_labels"}

    def empty(self, config: dict[str, Any]) -> Denoiser:
        from accelerate import init_empty_weights
        from diffusers import DiTTransformer2DModel

        with init_empty_weights(include_buffers=False):
            return DiTTransformer2DModel.from_config(config)

    def check(self, denoiser: Denoiser) -> None:
        check_plain(denoiser, self.layers(denoiser))

    def layers(self, denoiser: Denoiser) -> tuple[PrunableLayer, ...]:
        tokens = image_tokens(denoiser)
        found = []
        for index, block in enumerate(denoiser.transformer_blocks):
            prefix = f"transformer_blocks.{index}"
            attention = block.attn1
            width = denoiser.config.attention_head_dim
            found.append(
                PrunableLayer(
                    name=f"{prefix}.attn1",
                    kind="heads",
                    readers=(f"{prefix}.attn1.to_out.0",),
                    writers=tuple(f"{prefix}.attn1.{w}" for w in ("to_q", "to_k", "to_v")),
                    groups=denoiser.config.num_attention_heads,
                    width=width,
                    cost=tokens * width * 4 * attention.query_dim,
                    products=2 * tokens**2 * width,
                )
            )
            found.append(feed_forward_layer(f"{prefix}.ff", block.ff, attention.query_dim, tokens))
        return tuple(found)

    def targets(self, denoiser: Denoiser) -> tuple[WeightTarget, ...]:
        found: list[WeightTarget] = []
        for prefix in self.blocks(denoiser):
            found += shared_input(*(f"{prefix}.attn1.{w}" for w in ("to_q", "to_k", "to_v")))
            for name in ("attn1.to_out.0", "ff.net.0.proj", "ff.net.2"):
                found += shared_input(f"{prefix}.{name}")
        return tuple(found)

    def blocks(self, denoiser: Denoiser) -> tuple[str, ...]:
        return tuple(f"transformer_blocks.{i}" for i in range(len(denoiser.transformer_blocks)))

    def replace(
        self, builder: StageBuilder, layer: PrunableLayer, parts: Parts, groups: int
    ) -> None:
        if groups == 0:
            (reader,) = layer.readers
            bias = parts.get(f"{reader}.bias")
            features = builder.root.get_submodule(reader).out_features
            builder.replace(layer.name, BiasOnly(features, bias))
            return
        replace_linears(builder, layer, parts, groups)

    def simplify(self, builder: StageBuilder) -> None:
        for index, block in enumerate(builder.root.transformer_blocks):
            if isinstance(block.attn1, BiasOnly) and isinstance(block.ff, BiasOnly):
                builder.replace(f"transformer_blocks.{index}", BiasOnlyBlock(block))

    def parts(self, stage: Denoiser, layer: PrunableLayer) -> Parts:
        module = stage.get_submodule(layer.name)
        if isinstance(module, BiasOnly):
            (reader,) = layer.readers
            return bias_parts({reader: module.bias})
        return dense_parts(stage, layer)

    def latent_shape(self, denoiser: Denoiser) -> tuple[int, int, int]:
        config = denoiser.config
        return config.in_channels, config.sample_size, config.sample_size

    def check_inputs(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: dict[str, Any]
    ) -> None:
        if set(inputs) != {"class_labels"}:
            raise ValueError(
                "calibration: inputs of a DiT batch must be {'class_labels': ...}, "
                f"got {sorted(inputs)}."
            )
        labels = inputs["class_labels"]
        null = denoiser.config.num_embeds_ada_norm
        if labels.shape != (latents.shape[0],) or labels.is_floating_point():
            raise ValueError(
                f"calibration: class_labels must be ({latents.shape[0]},) whole numbers, "
                f"got {tuple(labels.shape)} {labels.dtype}."
            )
        if labels.numel() and (labels.min() < 0 or labels.max() > null):
            raise ValueError(
                f"calibration: class_labels must be in 0..{null} ({null} is the null label), "
                f"got {int(labels.min())}..{int(labels.max())}."
            )

    def null_inputs(
        self, denoiser: Denoiser, inputs: dict[str, Any], rows: torch.Tensor
    ) -> dict[str, Any]:
        labels = inputs["class_labels"]
        null = torch.full_like(labels, denoiser.config.num_embeds_ada_norm)
        return inputs | {"class_labels": torch.where(rows, null, labels)}

    def example_inputs(
        self, denoiser: Denoiser, batch_size: int, device: torch.device
    ) -> dict[str, Any]:
        return {"class_labels": torch.zeros(batch_size, dtype=torch.long, device=device)}

    def watch_block(
        self,
        module: Denoiser,
        name: str,
        add: Callable[[str, torch.Tensor, torch.Tensor], None],
    ) -> ExitStack:
        seen: dict[str, torch.Tensor] = {}

        def enter(block: nn.Module, args: tuple) -> None:
            seen["stream"] = args[0]

        def gates(norm: nn.Module, args: tuple, output: tuple) -> None:
            _, seen["gate_attn1"], _, _, seen["gate_ff"] = output

        def layer(part: str) -> Callable[..., None]:
            def leave(block: nn.Module, args: tuple, output: torch.Tensor) -> None:
                change = seen[f"gate_{part}"][:, None] * output
                add(f"{name}.{part}", seen["stream"], change)
                seen[part] = change
                seen["stream"] = seen["stream"] + change

            return leave

        def leave(block: nn.Module, args: tuple, output: torch.Tensor) -> None:
            change = seen["attn1"] + seen["ff"]
            add(name, output - change, change)

        stack = ExitStack()
        for handle in (
            module.register_forward_pre_hook(enter),
            module.norm1.register_forward_hook(gates),
            module.attn1.register_forward_hook(layer("attn1")),
            module.ff.register_forward_hook(layer("ff")),
            module.register_forward_hook(leave),
        ):
            stack.callback(handle.remove)
        return stack

    def predict(
        self,
        denoiser: Denoiser,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        inputs: dict[str, Any],
    ) -> torch.Tensor:
        output = denoiser(latents, timestep=timesteps, **inputs).sample
        return output[:, : latents.shape[1]]  # the rest, where there is one, is the variance

    def macs(self, denoiser: Denoiser) -> Macs:
        tokens, count = image_tokens(denoiser), linear_weights
        patch = denoiser.pos_embed.proj.weight.numel()
        linear = tokens * (patch + count(denoiser.proj_out_2)) + count(denoiser.proj_out_1)
        # The output head calls the first block's embedder once more.
        linear += count(denoiser.transformer_blocks[0].norm1.emb)
        products = 0
        for block in denoiser.transformer_blocks:
            linear += count(block.norm1) + tokens * (count(block.attn1) + count(block.ff))
            if not isinstance(block.attn1, BiasOnly):
                products += 2 * tokens**2 * block.attn1.inner_dim
        return Macs(linear, products)
