"""Time one denoiser call, dense against each stage, in one run and the same execution mode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter, adapter_for
from ..groups import Macs, leading_parameter
from ..runtime import StagedDenoiser


@dataclass(frozen=True)
class StageLatency:
    """Median milliseconds of one call of one network, and what it computes for one sample."""

    name: str
    steps: int
    milliseconds: float
    p20: float
    p80: float
    macs: int
    macs_with_attention: int


@dataclass(frozen=True)
class LatencyReport:
    """Dense beside staged; `efficiency` is the speed-up over the ratio of MACs."""

    device: str
    dtype: str
    batch_size: int
    repeats: int
    dense: StageLatency
    stages: list[StageLatency]
    speedup: float
    macs_ratio: float
    macs_ratio_without_attention: float
    efficiency: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)


def measure_latency(
    dense: nn.Module,
    staged: StagedDenoiser,
    *,
    batch_size: int = 1,
    repeats: int = 10,
    advance: Callable[[], None] = lambda: None,
) -> LatencyReport:
    """Time dense and stage calls in turn, so that a drifting machine drifts under all of them.

    The stage networks are timed as such, their calls averaged over the plan's steps; the
    ratio of each repeat is taken within that repeat, and its median is the speed-up.

    Args:
        batch_size: rows of one call.
        repeats: rounds over all networks, after one that is not counted.
    """
    adapter = adapter_for(dense)
    parameter = leading_parameter(dense)
    device = parameter.device
    networks: list[tuple[nn.Module, int]] = [(dense, staged.division.stages[0].first)]
    networks += [
        (model, (stage.first + stage.last) // 2)
        for model, stage in zip(staged.stage_models, staged.division.stages, strict=True)
    ]
    times = time_networks(adapter, networks, batch_size, repeats, advance)
    weight = [count / sum(staged.info.steps) for count in staged.info.steps]
    ratios = [
        times[0][r] / sum(w * row[r] for w, row in zip(weight, times[1:], strict=True))
        for r in range(repeats)
    ]
    dense_macs = adapter.macs(dense)
    linear, total = staged.mean_macs()
    speedup = statistics.median(ratios)
    names = [stage.name for stage in staged.division.stages]
    return LatencyReport(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=str(parameter.dtype).removeprefix("torch."),
        batch_size=batch_size,
        repeats=repeats,
        dense=_row("dense", sum(staged.info.steps), times[0], dense_macs),
        stages=[
            _row(name, count, row, macs)
            for name, count, row, macs in zip(
                names, staged.info.steps, times[1:], staged.macs(), strict=True
            )
        ],
        speedup=speedup,
        macs_ratio=dense_macs.total / total,
        macs_ratio_without_attention=dense_macs.linear / linear,
        efficiency=speedup * total / dense_macs.total,
    )


def time_networks(
    adapter: Adapter,
    networks: Sequence[tuple[nn.Module, int]],
    batch_size: int,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Time calls of denoisers of one family in turn, on the device and in the dtype of the first.

    Args:
        networks: each with the timestep that it is called at.
        batch_size: rows of one call.
        repeats: rounds over all networks, after one that is not counted.

    Returns:
        Milliseconds of each round, by network.
    """
    first = networks[0][0]
    parameter = leading_parameter(first)
    device = parameter.device
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, *adapter.latent_shape(first))
    latents = torch.randn(shape, generator=generator).to(device, parameter.dtype)
    inputs = adapter.example_inputs(first, batch_size, device)
    times: list[list[float]] = [[] for _ in networks]
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for row, (model, timestep) in zip(times, networks, strict=True):
                step = torch.full((batch_size,), timestep, device=device)
                call = partial(adapter.predict, model, latents, step, inputs)
                spent = _time_call(call, device)
                if repeat:
                    row.append(spent)
            advance()
    return times


def _time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Return milliseconds; on CUDA by events, so that launches are not what is timed."""
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


def _row(name: str, steps: int, times: list[float], macs: Macs) -> StageLatency:
    ordered = sorted(times)
    last = len(ordered) - 1
    return StageLatency(
        name=name,
        steps=steps,
        milliseconds=statistics.median(ordered),
        p20=ordered[round(0.2 * last)],
        p80=ordered[round(0.8 * last)],
        macs=macs.linear,
        macs_with_attention=macs.total,
    )
