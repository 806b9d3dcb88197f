"""Where the time of a call goes: products, attention, norms, the rest, and launching it all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .clocks import time_call

#: Parts of the names of operators that do the work of each kind.
_PRODUCTS = ("mm", "convolution", "conv2d", "conv3d", "linear", "einsum")
_ATTENTION = ("attention", "flash", "fmha", "softmax")
_NORMS = ("norm",)
#: Operators that compute nothing: their time is spent launching.
_FREE = (
    "view", "as_strided", "transpose", "permute", "select", "slice", "split", "unbind", "expand",
    "reshape", "empty", "narrow", "unsqueeze", "squeeze", "chunk", "detach", "alias",
    "unflatten", "flatten", "resolve", "result_type", "set_", "resize",
)  # fmt: skip


@dataclass(frozen=True)
class TimeSpent:
    """Milliseconds of one call by what they went to.

    Args:
        products: matrix products and convolutions.
        attention: scaled dot-product attention.
        norms: of tokens, heads and channels.
        rest: activations, modulation, residuals, copies, sinusoids.
        launches: what remains: Python, views, allocation; on a GPU, when it had nothing to do.
    """

    products: float
    attention: float
    norms: float
    rest: float
    launches: float

    @property
    def total(self) -> float:
        """Milliseconds of the call."""
        return self.products + self.attention + self.norms + self.rest + self.launches

    def to_dict(self) -> dict[str, float]:
        """Return plain values that JSON can hold."""
        return asdict(self)


def time_spent(call: Callable[[], Any], device: torch.device, repeats: int = 3) -> TimeSpent:
    """Profile a call.

    The profiler slows what it watches, so the shares of the operators are taken from it, and the
    whole from calls without it. On a GPU the time of kernels is exact, on a CPU operators of a
    microsecond look longer than they are, at the cost of `launches`.

    Args:
        repeats: calls, of which the median counts.
    """
    call()
    wall = statistics.median(time_call(call, device) for _ in range(repeats))
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as recorded:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = dict.fromkeys(("products", "attention", "norms", "rest", "free"), 0.0)
    for event in recorded.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.key.startswith(("aten::", "mkldnn::", "triton", "onednn")) or on_gpu:
            found[kind_of(event.key)] += spent / 1e3
    working = sum(v for k, v in found.items() if k != "free")
    # What operators seem to take longer than the whole call takes is the profiler's own.
    fitted = min(1.0, wall / working) if working else 1.0
    parts = {k: v * fitted for k, v in found.items() if k != "free"}
    return TimeSpent(**parts, launches=max(0.0, wall - sum(parts.values())))


def kind_of(operator: str) -> str:
    """Sort an operator or kernel by its name."""
    name = operator.lower()
    for kind, parts in (("attention", _ATTENTION), ("norms", _NORMS), ("products", _PRODUCTS)):
        if any(part in name for part in parts):
            return kind
    free = name == "aten::t" or any(part in name for part in _FREE)
    return "free" if free else "rest"


def mean_spent(parts: Sequence[TimeSpent], weights: Sequence[float]) -> TimeSpent:
    """Average over stages.

    Args:
        weights: shares of the steps.
    """
    pairs = list(zip(parts, weights, strict=True))
    return TimeSpent(
        **{name: sum(w * getattr(p, name) for p, w in pairs) for name in parts[0].to_dict()}
    )
