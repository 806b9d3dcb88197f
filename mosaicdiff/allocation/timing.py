"""Time layers at several widths with the inputs they have in a real call."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adapters import Adapter
from ..groups import Denoiser, PrunableLayer, leading_parameter
from ..pack import LayerState, dense_parts, narrow_parts
from ..surgery import Surgeon

#: Something to be timed.
Call = Callable[[], Any]
#: Makes a call some times and returns the milliseconds of one.
Timer = Callable[[Call], float]

#: A timing lasts at least so long, so that it holds more of the layer than of the clock.
LEAST_MILLISECONDS = 1.0
#: A call that no clock can see must end too.
MOST_CALLS = 4096
#: Columns that GPU matrix kernels take whole: 16 bytes of 16-bit numbers, and one tile.
ALIGNED, TILE = 8, 64


def default_timer(device: torch.device) -> Timer:
    """Return the timer of a device: CUDA events on a GPU, the clock on the CPU.

    Calls are timed in a row: on a GPU one short call alone would be all launch, while in a whole
    denoiser the launches of one layer hide behind the work of another.

    Raises:
        ValueError: the device is neither.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"measure_table: denoiser must be on the CPU or a CUDA device, got {device.type}. "
            "Pass a timer of your own."
        )
    spend = _spend_cuda if device.type == "cuda" else _spend_cpu

    def timer(call: Call) -> float:
        count = 1
        while True:
            spent = spend(call, count, device)
            if spent >= LEAST_MILLISECONDS or count >= MOST_CALLS:
                return spent / count
            count *= 2

    return timer


def time_rounds(
    calls: Sequence[Call], repeats: int, timer: Timer, advance: Callable[[], None]
) -> list[float]:
    """Time every call once a round, and return each one's median over the rounds.

    The first round warms up and is not counted.
    """
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for row, call in zip(times, calls, strict=True):
            spent = timer(call)
            if repeat:
                row.append(spent)
        advance()
    return [statistics.median(row) for row in times]


def isotonic(values: Sequence[float]) -> tuple[float, ...]:
    """Return the nearest non-decreasing sequence in least squares, by pooling neighbours.

    A layer that keeps more but times faster is noise, or a width that does not fit the kernels'
    tiles. An allocation must not be paid for keeping more, and since the widths measured do fit,
    the lines between them speak of widths rounded to tiles too.
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] * count > total * pools[-1][1]:
            last, size = pools.pop()
            total, count = total + last, count + size
        pools.append((total, count))
    return tuple(total / count for total, count in pools for _ in range(count))


def widths(layer: PrunableLayer, points: int) -> tuple[int, ...]:
    """Choose how many groups are kept at each measured width, ascending from none to all.

    All, where there are at most twice as many groups as points. Otherwise spread evenly, in whole
    tiles where those are fine enough; and the narrowest that is aligned, since between a layer
    that is gone and one that still launches every kernel lies a step that no line should bridge.
    """
    if layer.groups <= 2 * points:
        return tuple(range(layer.groups + 1))
    spread = np.linspace(0, layer.groups, points)
    tile = TILE // math.gcd(TILE, layer.width)
    if layer.groups >= tile * (points - 1):
        spread = tile * np.round(spread / tile)
    chosen = {min(round(kept), layer.groups) for kept in spread}
    return tuple(sorted(chosen | {0, math.ceil(ALIGNED / layer.width), layer.groups}))


def dense_call(denoiser: Denoiser, adapter: Adapter, batch_size: int) -> Call:
    """Return one call of a denoiser with inputs of the right shapes."""
    parameter = leading_parameter(denoiser)
    shape = (batch_size, *adapter.latent_shape(denoiser))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inputs = adapter.example_inputs(denoiser, batch_size, parameter.device)
    timesteps = torch.zeros(batch_size, device=parameter.device)
    latents = latents.to(parameter.device, parameter.dtype)
    return partial(adapter.predict, denoiser, latents, timesteps, inputs)


def layer_inputs(
    denoiser: nn.Module, names: Iterable[str], call: Call
) -> dict[str, tuple[tuple, dict[str, Any]]]:
    """Return the arguments that each named module gets during a call.

    The hooks are removed whatever happens.
    """
    found: dict[str, tuple[tuple, dict[str, Any]]] = {}
    handles = []
    try:
        for name in names:

            def hook(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                found.setdefault(name, (args, kwargs))

            module = denoiser.get_submodule(name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def timed_module(layer: PrunableLayer) -> tuple[str, bool]:
    """Return the name of the module to time a layer by, and whether it holds that layer alone."""
    alone = all(name.startswith(f"{layer.name}.") for name in layer.modules)
    alone = alone and not any(piece.partial for piece in layer.pieces)
    return (layer.name, True) if alone else (layer.block, False)


def narrowed(denoiser: Denoiser, surgeon: Surgeon, layer: PrunableLayer, kept: int) -> nn.Module:
    """Return the timed module of a layer that keeps its first groups only."""
    groups = torch.arange(kept)
    parts = narrow_parts(dense_parts(denoiser, layer), layer, groups)
    builder = surgeon.build(denoiser, {layer.name: LayerState(groups, parts)})
    return builder.root.get_submodule(timed_module(layer)[0])


def _spend_cpu(call: Call, count: int, device: torch.device) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return 1e3 * (time.perf_counter() - started)


def _spend_cuda(call: Call, count: int, device: torch.device) -> float:
    # Events are recorded on the stream of the current device, which may be another.
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
