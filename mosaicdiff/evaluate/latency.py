"""Time one denoiser call, dense against each stage, in one run and the same execution mode."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter, adapter_for
from ..execution.api import optimized_twins
from ..execution.products import Joins
from ..groups import Macs, leading_parameter
from ..runtime import StagedDenoiser
from .clocks import denoiser_calls, time_in_turn

#: How a network may be run: what `optimized_twins` is told; None is as diffusers runs it.
MODES: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "fused": {},
    "compiled": {"compile": True},
    "graphs": {"cuda_graphs": True},
    "compiled-graphs": {"compile": True, "cuda_graphs": True},
}


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
    """Dense beside staged in one mode; `efficiency` is the speed-up over the ratio of MACs.

    `over_eager` are the speed-ups of the dense and of the pruned network in this mode over the
    dense one as diffusers runs it.
    """

    mode: str
    device: str
    dtype: str
    batch_size: int
    repeats: int
    dense: StageLatency
    stages: list[StageLatency]
    milliseconds: float
    speedup: float
    macs_ratio: float
    macs_ratio_without_attention: float
    efficiency: float
    over_eager: tuple[float, float]

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
    """Time dense and stage calls in turn, as diffusers runs them; see `measure_modes`."""
    ((report,),) = measure_modes(
        dense, staged, ["eager"], batch_size=batch_size, repeats=repeats, advance=advance
    )
    return report


def measure_modes(
    dense: nn.Module,
    staged: StagedDenoiser,
    modes: Sequence[str],
    *,
    batch_size: int = 1,
    repeats: int = 10,
    steps: Sequence[Sequence[int]] | None = None,
    networks: list[list[tuple[nn.Module, int]]] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[list[LatencyReport]]:
    """Time dense and stage calls in every mode, all in turn, so that all see the same machine.

    The stage networks are timed as such, their calls averaged over the steps; ratios are taken
    within a round, and their median is the figure.

    Args:
        modes: of `MODES`.
        batch_size: rows of one call.
        repeats: rounds over all networks, after one that is not counted.
        steps: of each stage, in each of several runs that the calls are averaged over; that of
            the plan where not given.
        networks: what `mode_networks` made of the modes, where that is there: its weights are
            joined and its graphs compiled once for all batch sizes.

    Returns:
        For each run, a report of each mode.

    Raises:
        ValueError: a mode is unknown, or its family is not fused.
        RuntimeError: a mode that needs a CUDA device without one.
    """
    adapter = adapter_for(dense)
    parameter = leading_parameter(dense)
    device = parameter.device
    runs = [staged.info.steps] if steps is None else steps
    if networks is None:
        networks = mode_networks(dense, staged, modes)
    calls = [c for group in networks for c in denoiser_calls(adapter, group, batch_size)]
    eager = "eager" in modes
    if not eager:
        calls += denoiser_calls(adapter, [(dense, networks[0][0][1])], batch_size)
    times = time_in_turn(calls, device, repeats, advance)
    per_mode = 1 + len(staged.stage_models)
    plain = times[modes.index("eager") * per_mode] if eager else times[-1]
    by_mode = [times[i : i + per_mode] for i in range(0, len(modes) * per_mode, per_mode)]
    return [
        [
            _report(adapter, dense, staged, mode, rows, plain, run, batch_size)
            for mode, rows in zip(modes, by_mode, strict=True)
        ]
        for run in runs
    ]


def check_modes(modes: Sequence[str], device: torch.device) -> None:
    """Refuse modes that are not there, before anything is loaded or timed.

    Raises:
        ValueError: none is given, or one is unknown.
        RuntimeError: one needs a CUDA device, and the device is another.
    """
    for mode in modes or ("",):
        if mode not in MODES:
            raise ValueError(f"bench: mode must be one of {', '.join(MODES)}, got {mode!r}.")
        if "graphs" in mode and device.type != "cuda":
            raise RuntimeError(
                f"bench: mode {mode} needs a CUDA device, got {device.type}. Leave it out, or pass "
                "--device cuda."
            )


def mode_networks(
    dense: nn.Module, staged: StagedDenoiser, modes: Sequence[str]
) -> list[list[tuple[nn.Module, int]]]:
    """Return for each mode the dense network and the stages, each with a timestep of its own.

    All are around the same weights.

    Args:
        modes: of `MODES`.
    """
    check_modes(modes, leading_parameter(dense).device)
    stages = list(staged.stage_models)
    timesteps = [staged.division.stages[0].first]
    timesteps += [(stage.first + stage.last) // 2 for stage in staged.division.stages]
    joins = Joins([dense, *stages])
    found = []
    for mode in modes:
        options = MODES[mode]
        models = [dense, *stages]
        if options is not None:
            models = optimized_twins(models, joins, **options)
        found.append(list(zip(models, timesteps, strict=True)))
    return found


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
    calls = denoiser_calls(adapter, networks, batch_size)
    device = leading_parameter(networks[0][0]).device
    return time_in_turn(calls, device, repeats, advance)


def _report(
    adapter: Adapter,
    dense: nn.Module,
    staged: StagedDenoiser,
    mode: str,
    times: list[list[float]],
    plain: list[float],
    steps: Sequence[int],
    batch_size: int,
) -> LatencyReport:
    parameter = leading_parameter(dense)
    weight = [count / sum(steps) for count in steps]
    rounds = len(plain)
    pruned = [
        sum(w * row[r] for w, row in zip(weight, times[1:], strict=True)) for r in range(rounds)
    ]

    def ratio(above: Sequence[float], below: Sequence[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    dense_macs, macs = adapter.macs(dense), staged.macs()
    linear = sum(w * m.linear for w, m in zip(weight, macs, strict=True))
    total = sum(w * m.total for w, m in zip(weight, macs, strict=True))
    speedup = ratio(times[0], pruned)
    device = parameter.device
    return LatencyReport(
        mode=mode,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=str(parameter.dtype).removeprefix("torch."),
        batch_size=batch_size,
        repeats=rounds,
        dense=_row("dense", sum(steps), times[0], dense_macs),
        stages=[
            _row(stage.name, count, row, counted)
            for stage, count, row, counted in zip(
                staged.division.stages, steps, times[1:], macs, strict=True
            )
        ],
        milliseconds=statistics.median(pruned),
        speedup=speedup,
        macs_ratio=dense_macs.total / total,
        macs_ratio_without_attention=dense_macs.linear / linear,
        efficiency=speedup * total / dense_macs.total,
        over_eager=(ratio(plain, times[0]), ratio(plain, pruned)),
    )


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
