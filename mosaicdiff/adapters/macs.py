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

#: Modules whose products are of weights; what is left are products of activations: attention.
#: The operators do not tell: of a slice of tokens a linear is a batched product, as attention is.
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
    root = type(copy).__name__
    weighted = [f"{root}.{n}" for n, m in copy.named_modules() if isinstance(m, _WEIGHTED)]
    linear = sum(sum(counts[name].values()) for name in weighted if name in counts)
    return Macs(linear // 2, (sum(counts.get("Global", {}).values()) - linear) // 2)
