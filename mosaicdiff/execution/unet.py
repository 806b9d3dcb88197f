"""U-Nets of SDXL, SD 1.5 and SD 2.1: what timestep and text give to all layers, made at once."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional

from .basic import fuse_blocks
from .fusion import Fusion
from .products import Joins, Place
from .shared import Part, shared_parts


def fuse_unet(model: Any, joins: Joins) -> Fusion:
    """Return the fused way to run a U-Net or a stage of one."""
    fusion = Fusion()
    modules = list(model.modules())
    resnets = [module for module in modules if _is_plain(module)]
    others = sum(isinstance(module, ResnetBlock2D) for module in modules) - len(resnets)
    if others:
        fusion.left.append(
            f"{others} residual blocks, which resample or are scaled by the timestep"
        )
    if resnets:
        places: list[Place] = [(resnet, "time_emb_proj") for resnet in resnets]
        times = shared_parts(places, joins, fusion, functional.silu)
        for resnet, time in zip(resnets, times, strict=True):
            fusion.forwards.append((resnet, _Resnet(resnet, time, fusion).forward))
    fuse_blocks([m for m in modules if isinstance(m, BasicTransformerBlock)], joins, fusion)
    return fusion


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a residual block only adds what the timestep gives; others stay as they are."""
    if not isinstance(module, ResnetBlock2D) or module.time_emb_proj is None:
        return False
    samples = module.upsample is not None or module.downsample is not None
    usual = module.time_embedding_norm == "default" and not module.skip_time_act
    return usual and not samples and isinstance(module.nonlinearity, nn.SiLU)


class _Resnet:
    """Run one residual block, told what the timestep adds."""

    def __init__(self, block: Any, time: Part, fusion: Fusion) -> None:
        self._time = time
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
        stream = stream + self._time(temb)[:, :, None, None]
        stream = self._conv2(functional.silu(self._norm2(stream)))
        if self._shortcut is not None:
            input_tensor = self._shortcut(input_tensor)
        stream = input_tensor + stream
        return stream if self._scale == 1 else stream / self._scale
