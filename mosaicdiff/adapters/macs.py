"""Count what a call of a denoiser multiplies, by running its shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
    counts = counter.get_flop_counts().get("Global", {})
    linear = sum(n for op, n in counts.items() if op.__name__ in _WEIGHT_PRODUCTS)
    return Macs(linear // 2, (sum(counts.values()) - linear) // 2)
