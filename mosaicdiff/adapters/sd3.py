"""SD3 and SD3.5: `SD3Transformer2DModel`, text and image attended to together (MMDiT)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

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
from .joint import JointBiasOnly, JointBiasOnlyBlock, watch_streams

#: Text tokens that costs are counted for: 77 of CLIP and 256 of T5, as `StableDiffusion3Pipeline`
#: joins them by default. What is pruned does not depend on how many there are.
TEXT_TOKENS = 333

_IMAGE_WRITERS = ("to_q", "to_k", "to_v")
_TEXT_WRITERS = ("add_q_proj", "add_k_proj", "add_v_proj")
_CONDITION = ("encoder_hidden_states", "pooled_projections")
_NULL = tuple(f"negative_{name}" for name in _CONDITION)


class SD3Adapter(Adapter):
    """Remove heads of joint attention from both streams, heads of dual attention, GELU neurons.

    Calibration inputs are `encoder_hidden_states` (B, L, joint_attention_dim) and
    `pooled_projections` (B, pooled_projection_dim). The null condition is the encodings of the
    empty prompt, which only the text encoders know: where the batches hold them as
    `negative_encoder_hidden_states` and `negative_pooled_projections`, of the same shapes,
    `null_share` takes from those; where they do not, `null_share` must be 0.

    Args:
        text_tokens: that costs are counted for.
    """

    denoiser_class = "SD3Transformer2DModel"
    timestep_argument = ("timestep", 3)
    joint = True
    sigma_scale = 1000.0
    condition = {name: name for name in _CONDITION}
    optional_condition = {name: name for name in _NULL}

    def __init__(self, text_tokens: int = TEXT_TOKENS) -> None:
        self.text_tokens = text_tokens

    def empty(self, config: dict[str, Any]) -> Denoiser:
        from accelerate import init_empty_weights
        from diffusers import SD3Transformer2DModel

        with init_empty_weights(include_buffers=False):
            return SD3Transformer2DModel.from_config(config)

    def check(self, denoiser: Denoiser) -> None:
        check_plain(denoiser, self.layers(denoiser))

    def layers(self, denoiser: Denoiser) -> tuple[PrunableLayer, ...]:
        image, text = image_tokens(denoiser), self.text_tokens
        found = []
        for prefix, block in zip(self.blocks(denoiser), denoiser.transformer_blocks, strict=True):
            features = block.attn.query_dim
            found.append(_attention(denoiser, f"{prefix}.attn", image, text))
            if block.attn2 is not None:
                found.append(_attention(denoiser, f"{prefix}.attn2", image, 0))
            for name, tokens in (("ff", image), ("ff_context", text)):
                module = getattr(block, name)
                if module is not None:
                    found.append(feed_forward_layer(f"{prefix}.{name}", module, features, tokens))
        return tuple(found)

    def targets(self, denoiser: Denoiser) -> tuple[WeightTarget, ...]:
        found: list[WeightTarget] = []
        for layer in self.layers(denoiser):
            image = [name for name in layer.writers if name.rpartition(".")[2] in _IMAGE_WRITERS]
            text = [name for name in layer.writers if name.rpartition(".")[2] in _TEXT_WRITERS]
            alone = [name for name in layer.writers if name not in (*image, *text)]
            for group in (image, text, *([name] for name in (*alone, *layer.readers))):
                found += shared_input(*group)
        return tuple(found)

    def blocks(self, denoiser: Denoiser) -> tuple[str, ...]:
        return tuple(f"transformer_blocks.{i}" for i in range(len(denoiser.transformer_blocks)))

    def replace(
        self, builder: StageBuilder, layer: PrunableLayer, parts: Parts, groups: int
    ) -> None:
        if groups > 0:
            replace_linears(builder, layer, parts, groups)
            return
        left = [
            BiasOnly(builder.root.get_submodule(reader).out_features, parts.get(f"{reader}.bias"))
            for reader in layer.readers
        ]
        if _is_joint(layer):
            context = left[1] if len(left) > 1 else None
            builder.replace(layer.name, JointBiasOnly(left[0], context))
        else:
            builder.replace(layer.name, left[0])

    def simplify(self, builder: StageBuilder) -> None:
        for name, block in zip(
            self.blocks(builder.root), builder.root.transformer_blocks, strict=True
        ):
            rest = [m for m in (block.attn2, block.ff, block.ff_context) if m is not None]
            gone = isinstance(block.attn, JointBiasOnly)
            if gone and all(isinstance(module, BiasOnly) for module in rest):
                builder.replace(name, JointBiasOnlyBlock(block))

    def parts(self, stage: Denoiser, layer: PrunableLayer) -> Parts:
        module = stage.get_submodule(layer.name)
        if isinstance(module, BiasOnly):
            return bias_parts({layer.readers[0]: module.bias})
        if isinstance(module, JointBiasOnly):
            left = (module.image, module.context)
            pairs = zip(layer.readers, left, strict=False)  # the last block has one reader
            return bias_parts({name: one.bias for name, one in pairs if one is not None})
        return dense_parts(stage, layer)

    def latent_shape(self, denoiser: Denoiser) -> tuple[int, int, int]:
        config = denoiser.config
        return config.in_channels, config.sample_size, config.sample_size

    def check_inputs(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: dict[str, Any]
    ) -> None:
        if set(inputs) not in ({*_CONDITION}, {*_CONDITION, *_NULL}):
            raise ValueError(
                f"calibration: inputs of an SD3 batch must be {' and '.join(_CONDITION)} and, "
                f"where there is a null condition, {' and '.join(_NULL)}, got {sorted(inputs)}."
            )
        config = denoiser.config
        for text, pooled in (_CONDITION, _NULL):
            if text not in inputs:
                continue
            shape, rows = tuple(inputs[text].shape), len(latents)
            tokens = inputs[_CONDITION[0]].shape[1:2]
            expected = (rows, *tokens, config.joint_attention_dim)
            if len(shape) != 3 or shape != expected:
                raise ValueError(
                    f"calibration: {text} must be ({rows}, text tokens, "
                    f"{config.joint_attention_dim}), the same of all, got {shape}."
                )
            if tuple(inputs[pooled].shape) != (rows, config.pooled_projection_dim):
                raise ValueError(
                    f"calibration: {pooled} must be ({rows}, {config.pooled_projection_dim}), got "
                    f"{tuple(inputs[pooled].shape)}."
                )
        for name, value in inputs.items():
            if not (value.is_floating_point() and torch.isfinite(value).all()):
                raise ValueError(f"calibration: {name} must be finite floating-point numbers.")

    def null_inputs(
        self, denoiser: Denoiser, inputs: dict[str, Any], rows: torch.Tensor
    ) -> dict[str, Any]:
        found = {name: inputs[name] for name in _CONDITION}
        if not rows.any():
            return found
        if not set(_NULL) <= set(inputs):
            raise ValueError(
                "calibration: null_share must be 0 where the batches do not hold the null "
                f"condition. Give them {' and '.join(_NULL)}, the encodings of the empty prompt, "
                "or set null_share=0."
            )
        for name, null in zip(_CONDITION, _NULL, strict=True):
            chosen = rows.reshape(-1, *[1] * (found[name].ndim - 1))
            found[name] = torch.where(chosen, inputs[null], found[name])
        return found

    def example_inputs(
        self, denoiser: Denoiser, batch_size: int, device: torch.device
    ) -> dict[str, Any]:
        config, dtype = denoiser.config, next(denoiser.parameters()).dtype
        text = (batch_size, self.text_tokens, config.joint_attention_dim)
        return {
            "encoder_hidden_states": torch.zeros(text, device=device, dtype=dtype),
            "pooled_projections": torch.zeros(
                batch_size, config.pooled_projection_dim, device=device, dtype=dtype
            ),
        }

    def watch_block(
        self,
        module: Denoiser,
        name: str,
        add: Callable[[str, torch.Tensor, torch.Tensor], None],
    ) -> ExitStack:
        """Report image and text tokens under the same names: they are counted together."""
        return watch_streams(module, name, add)

    def predict(
        self,
        denoiser: Denoiser,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        inputs: dict[str, Any],
    ) -> torch.Tensor:
        condition = {name: inputs[name].to(latents.dtype) for name in _CONDITION}
        return denoiser(latents, timestep=timesteps, **condition).sample

    def macs(self, denoiser: Denoiser) -> Macs:
        image, text = image_tokens(denoiser), self.text_tokens
        linear = image * denoiser.pos_embed.proj.weight.numel()
        linear += image * linear_weights(denoiser.proj_out)
        linear += text * linear_weights(denoiser.context_embedder)
        linear += linear_weights(denoiser.time_text_embed) + linear_weights(denoiser.norm_out)
        products = 0
        for block in denoiser.transformer_blocks:
            linear += linear_weights(block.norm1)
            if not (block.context_pre_only and isinstance(block, JointBiasOnlyBlock)):
                linear += linear_weights(block.norm1_context)
            linear += image * (linear_weights(block.attn2) + linear_weights(block.ff))
            linear += text * linear_weights(block.ff_context)
            if not isinstance(block.attn, JointBiasOnly):
                added = [getattr(block.attn, name) for name in (*_TEXT_WRITERS, "to_add_out")]
                of_text = sum(linear_weights(module) for module in added)
                linear += text * of_text + image * (linear_weights(block.attn) - of_text)
                products += 2 * (image + text) ** 2 * block.attn.inner_dim
            if block.attn2 is not None and not isinstance(block.attn2, BiasOnly):
                products += 2 * image**2 * block.attn2.inner_dim
        return Macs(linear, products)


def _attention(denoiser: Denoiser, name: str, image: int, text: int) -> PrunableLayer:
    """Describe the heads of an attention over so many tokens; joint where there is text."""
    attention, width = denoiser.get_submodule(name), denoiser.config.attention_head_dim
    readers, writers, linears = ["to_out.0"], list(_IMAGE_WRITERS), 4 * image
    if text:
        writers += _TEXT_WRITERS
        linears += 3 * text
        if attention.to_add_out is not None:
            readers.append("to_add_out")
            linears += text
    norms = [n for n, _ in attention.named_parameters(prefix=name) if ".norm_" in n]
    return PrunableLayer(
        name=name,
        kind="heads",
        readers=tuple(f"{name}.{reader}" for reader in readers),
        writers=tuple(f"{name}.{writer}" for writer in writers),
        groups=denoiser.config.num_attention_heads,
        width=width,
        cost=linears * width * attention.query_dim,
        products=2 * (image + text) ** 2 * width,
        fixed=tuple(norms),
    )


def _is_joint(layer: PrunableLayer) -> bool:
    return any(name.endswith(_TEXT_WRITERS) for name in layer.writers)
