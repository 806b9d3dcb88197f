"""DiT: `DiTTransformer2DModel`, class-conditional."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..groups import Denoiser
from ..pack import BiasOnly, StageBuilder
from .attentions import LEGACY
from .common import image_tokens
from .declared import Family
from .family import Blocks, Neurons
from .inputs import Condition


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
        emb = norm.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        _, _, gate_attn, _, _, gate_ff = norm.linear(norm.silu(emb)).chunk(6, dim=1)
        layers: Any = self
        first = hidden_states[:, :1]  # called, so that hooks that bring weights run
        hidden_states = hidden_states + gate_attn[:, None] * layers.attn1(first)
        return hidden_states + gate_ff[:, None] * layers.ff(first)


class DiTAdapter(Family):
    """Remove heads of self-attention and GELU neurons from every block."""

    denoiser_class = "DiTTransformer2DModel"
    pipelines = ("DiTPipeline",)
    summary = "heads of self-attention and FFN neurons of every block"
    norms = "none"
    processors = ("AttnProcessor", "AttnProcessor2_0")
    leaves = (
        ("pos_embed*", "patch embedder: its rows are the residual stream"),
        ("transformer_blocks.*.norm*", "modulation and norms: as wide as the residual stream"),
        ("proj_out*", "output head: its columns are the residual stream"),
    )
    timestep_argument = ("timestep", 1)
    repeats = ("transformer_blocks.*.norm1.emb",)
    watches_blocks = True
    conditions = (Condition("class_labels", label="labels", whole_numbers=True),)
    block_kinds = (
        Blocks(
            "transformer_blocks.*",
            (
                LEGACY.self_attention("attn1"),
                Neurons("ff", ("net.0.proj",), "net.2", "image"),
            ),
        ),
    )

    def tokens(self, denoiser: Denoiser) -> Mapping[str, int]:
        return {"image": image_tokens(denoiser)}

    def simplify(self, builder: StageBuilder) -> None:
        for index, block in enumerate(builder.root.transformer_blocks):
            if isinstance(block.attn1, BiasOnly) and isinstance(block.ff, BiasOnly):
                builder.replace(f"transformer_blocks.{index}", BiasOnlyBlock(block))

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
