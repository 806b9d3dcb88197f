"""Time calls of denoisers in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter
from ..groups import leading_parameter


def denoiser_calls(
    adapter: Adapter, networks: Sequence[tuple[nn.Module, int]], batch_size: int
) -> list[Callable[[], Any]]:
    """Return a call of each network with the same inputs, on the device of the first.

    Args:
        networks: of one family, each with the timestep that it is called at.
        batch_size: rows of one call.
    """
    first = networks[0][0]
    parameter = leading_parameter(first)
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, *adapter.latent_shape(first))
    latents = torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype)
    inputs = adapter.example_inputs(first, batch_size, parameter.device)
    return [
        partial(
            adapter.predict, model, latents,
            torch.full((batch_size,), timestep, device=parameter.device), inputs,
        )
        for model, timestep in networks
    ]  # fmt: skip


def time_in_turn(
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Make every call once a round, so that a drifting machine drifts under all of them.

    Args:
        repeats: rounds, after one that is not counted.

    Returns:
        Milliseconds of each round, by call.
    """
    times: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for row, call in zip(times, calls, strict=True):
                spent = time_call(call, device)
                if repeat:
                    row.append(spent)
            advance()
    return times


def time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Return milliseconds; on CUDA by events, so that a wait for earlier work is not counted."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)
