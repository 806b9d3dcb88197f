"""Count what a call of a denoiser multiplies, by running its shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
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


#: Counts by what they depend on: a request asks for those of the same few networks many times.
_COUNTED: OrderedDict[Hashable, Macs] = OrderedDict()
_REMEMBERED = 256


def count_macs(
    denoiser: Denoiser, call: Callable[[Denoiser, torch.device], Any], sizes: Hashable
) -> Macs:
    """Run a call of one sample on the meta device and count its multiply-accumulates.

    Counts are remembered by configuration, modules, shapes and sizes.

    Products of weights (linears, convolutions) and of activations (attention, linear attention)
    are told apart. Nothing is computed and no weight is read.

    Args:
        denoiser: dense, or a stage.
        call: runs a denoiser with inputs on a device.
        sizes: of those inputs.
    """
    key = (*_key(denoiser), sizes)
    if key not in _COUNTED:
        _COUNTED[key] = _count(denoiser, call)
        if len(_COUNTED) > _REMEMBERED:
            _COUNTED.popitem(last=False)
    _COUNTED.move_to_end(key)
    return _COUNTED[key]


def _key(denoiser: Denoiser) -> tuple[Hashable, ...]:
    """Return all of a denoiser that a count depends on."""
    shapes = tuple((name, tuple(p.shape)) for name, p in denoiser.named_parameters())
    # What stands for a layer may hold what the layer held.
    kinds = tuple(type(module) for module in denoiser.modules())
    return repr(sorted(denoiser.config.items(), key=str)), shapes, kinds


def _count(denoiser: Denoiser, call: Callable[[Denoiser, torch.device], Any]) -> Macs:
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
