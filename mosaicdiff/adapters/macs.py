"""Count what a call of a denoiser multiplies, by running its shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..groups import Denoiser, Macs
from ..pack import meta_copy

#: Products of a layer's weights; what is left are products of activations: attention.
_WEIGHT_PRODUCTS = ("mm", "addmm", "convolution", "_scaled_mm")


def count_macs(denoiser: Denoiser, call: Callable[[Denoiser, torch.device], Any]) -> Macs:
    """Run a call of one sample on the meta device and count its multiply-accumulates.

    Products of weights (linears, convolutions) and of activations (attention, linear attention)
    are told apart. Nothing is computed and no weight is read.

    Args:
        denoiser: dense, or a stage.
        call: runs a denoiser with inputs on a device.
    """
    # Constants that a model keeps outside its buffers are real: fake tensors take them along.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        copy = meta_copy(denoiser)
        with FlopCounterMode(display=False) as counter:
            call(copy, torch.device("meta"))
    counts = counter.get_flop_counts()
    total = counts.get("Global", {})
    linear = sum(n for op, n in total.items() if op.__name__ in _WEIGHT_PRODUCTS)
    # Of an input that is not contiguous a linear's product is a batched one, as attention's are.
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for name, module in copy.named_modules():
        if isinstance(module, kinds):
            own = counts.get(f"{type(copy).__name__}.{name}", {})
            linear += sum(n for op, n in own.items() if op.__name__ not in _WEIGHT_PRODUCTS)
    return Macs(linear // 2, (sum(total.values()) - linear) // 2)
