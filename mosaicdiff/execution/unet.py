"""U-Nets of SDXL, SD 1.5 and SD 2.1: what timestep and text give to all layers, made at once."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional

from ..pack import BiasOnly
from .attention import CrossAttention, FeedForward, SelfAttention
from .fusion import Fusion
from .products import Joins, Place
from .shared import SharedProducts


def fuse_unet(model: Any, joins: Joins) -> Fusion:
    """Return the fused way to run a U-Net or a stage of one."""
    fusion = Fusion()
    modules = list(model.modules())
    resnets = [module for module in modules if _is_plain(module)]
    if resnets:
        times = shared_products(
            [(resnet, "time_emb_proj") for resnet in resnets], joins, fusion, functional.silu
        )
        for resnet in resnets:
            fusion.forwards.append((resnet, _Resnet(resnet, times, fusion).forward))
    fuse_blocks([m for m in modules if isinstance(m, BasicTransformerBlock)], joins, fusion)
    return fusion


def fuse_blocks(blocks: list[Any], joins: Joins, fusion: Fusion) -> None:
    """Fuse transformer blocks of self-attention, attention to one text, and FFN."""
    crossing = [
        b.attn2 for b in blocks if b.attn2 is not None and not isinstance(b.attn2, BiasOnly)
    ]
    places: list[Place] = [(a, name) for a in crossing for name in ("to_k", "to_v")]
    text = shared_products(places, joins, fusion) if places else None
    for block in blocks:
        _check(block)
        own, cross, ff = fusion.hold(block, "attn1", "attn2", "ff")
        layers: list[Any] = []
        if not isinstance(own, BiasOnly):
            layers.append((own, SelfAttention(own, joins)))
        if text is not None and cross in crossing:
            layers.append((cross, CrossAttention(cross, text)))
        for module, fused in layers:
            fused.install(fusion)
            fusion.forwards.append((module, fused.forward))
        if not isinstance(ff, BiasOnly):
            fusion.forwards.append((ff, FeedForward(ff, fusion).forward))


def shared_products(
    places: list[Place], joins: Joins, fusion: Fusion, before: Any = None
) -> SharedProducts:
    """Return linears of one input, which stages that run the same ones share."""
    key = tuple(id(owner._modules[name]) for owner, name in places)
    found: SharedProducts = joins.shared(
        ("products", *key), lambda: SharedProducts(places, joins, before)
    )
    fusion.products += found.products
    fusion.once.append(found.once)
    return found


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a residual block only adds what the timestep gives; others stay as they are."""
    if not isinstance(module, ResnetBlock2D) or module.time_emb_proj is None:
        return False
    samples = module.upsample is not None or module.downsample is not None
    usual = module.time_embedding_norm == "default" and not module.skip_time_act
    return usual and not samples and isinstance(module.nonlinearity, nn.SiLU)


def _check(block: Any) -> None:
    if block.only_cross_attention:
        raise ValueError(
            "optimize: attn1 must be self-attention, but this block attends to the text twice. "
            "Leave this model as it is."
        )
    if block._chunk_size is not None:
        raise ValueError(
            "optimize: the FFN must not be run in chunks. Call disable_forward_chunking() first."
        )


class _Resnet:
    """Run one residual block, told what the timestep adds."""

    def __init__(self, block: Any, times: SharedProducts, fusion: Fusion) -> None:
        self._times, self._index = times, times.index[id(block.time_emb_proj)]
        self._norm1, self._conv1, self._norm2, self._conv2 = fusion.hold(
            block, "norm1", "conv1", "norm2", "conv2"
        )
        self._shortcut = block.conv_shortcut
        if self._shortcut is not None:
            fusion.hold(block, "conv_shortcut")
        self._scale = block.output_scale_factor

    def forward(
        self, input_tensor: torch.Tensor, temb: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Run as `ResnetBlock2D.forward`."""
        stream = self._conv1(functional.silu(self._norm1(input_tensor)))
        stream = stream + self._times(temb, self._index)[:, :, None, None]
        stream = self._conv2(functional.silu(self._norm2(stream)))
        if self._shortcut is not None:
            input_tensor = self._shortcut(input_tensor)
        stream = input_tensor + stream
        return stream if self._scale == 1 else stream / self._scale
