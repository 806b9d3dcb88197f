"""Bench a pruned denoiser beside the dense one: every mode, batch size and number of steps."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

from ..adapters import adapter_for
from ..groups import leading_parameter
from ..memory.count import measure_memory, state_memory
from ..request import sampling_of
from ..runtime import StagedDenoiser
from ..trajectory.schedule import step_log_snr
from ..trajectory.schedulers import start_steps
from .clocks import denoiser_calls
from .cost import denoiser_size
from .latency import LatencyReport, measure_modes, mode_networks
from .peak import peak_bytes
from .spent import TimeSpent, mean_spent, time_spent

#: By mode, networks and the timesteps they are called at; see `mode_networks`.
ModeNetworks = dict[str, list[tuple[nn.Module, int]]]


@dataclass(frozen=True)
class BenchRow:
    """One network in one mode, at one batch size and number of steps.

    Args:
        network: dense or pruned.
        milliseconds: of a call, mean over the steps; medians of rounds.
        milliseconds_per_image: of all steps, over the rows of a call; the denoiser alone, and
            twice that with guidance.
        macs: of a call for one sample, attention products left out, mean over the steps.
        macs_with_attention: the same, with them.
        peak_bytes: weights of the network, all stages, and the most that a call holds beside;
            None where compiled code or a graph keeps that to itself.
        speedup: over the dense network in this mode.
        macs_ratio: MACs of the dense network over this one's, attention products counted.
        efficiency: speed-up over the ratio of MACs.
        over_eager: speed-up over the dense network as diffusers runs it.
    """

    mode: str
    network: str
    batch_size: int
    steps: int
    milliseconds: float
    milliseconds_per_image: float
    macs: float
    macs_with_attention: float
    peak_bytes: int | None
    speedup: float
    macs_ratio: float
    efficiency: float
    over_eager: float


@dataclass(frozen=True)
class BenchReport:
    """All rows, what each stage took, where the time went, and the memory of the stages.

    Args:
        time: for each mode and network, milliseconds of a call by what they went to, at the first
            batch size and the plan's steps.
        memory: parameters; bytes stated by count for either way to hold the stages, and measured.
    """

    model: str
    device: str
    dtype: str
    threads: int
    repeats: int
    versions: dict[str, str]
    rows: list[BenchRow]
    latencies: list[LatencyReport] = field(repr=False)
    time: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)


def bench_modes(
    model: str,
    dense: nn.Module,
    staged: StagedDenoiser,
    scheduler: Any,
    *,
    modes: Sequence[str] = ("eager", "fused"),
    batch_sizes: Sequence[int] = (1,),
    steps: Sequence[int] = (50,),
    repeats: int = 10,
    where: bool = True,
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> BenchReport:
    """Time dense and pruned in every mode, in turn in one run, and count what they take.

    Args:
        model: what it is called in the report.
        scheduler: says which stage each step is in.
        modes: of `latency.MODES`.
        steps: numbers of sampling steps; the calls are timed once for all.
        repeats: rounds over all networks, after one that is not counted.
        where: profile a call of each network and mode too.
        tell: hears what is done, how far, of how much.

    Raises:
        ValueError: a mode is unknown, or its family is not fused; a number of steps is none.
        RuntimeError: a mode that needs a CUDA device without one.
    """
    if staged.stage_memory != "resident":
        raise ValueError(
            "bench: stages must be resident to be timed one by one, got 'swap'. Call "
            "set_stage_memory('resident') first; swapping is measured besides."
        )
    counts = [(count, _steps_of_stages(staged, scheduler, count)) for count in steps]
    device = leading_parameter(dense).device
    rows: list[BenchRow] = []
    latencies: list[LatencyReport] = []
    done, total = 0, len(batch_sizes) * (repeats + 1)

    def advance() -> None:
        nonlocal done
        done += 1
        tell("time", done, total)

    weights = {"dense": sum(measure_memory(dense).live.values()),
               "pruned": sum(measure_memory(staged).live.values())}  # fmt: skip
    networks = mode_networks(dense, staged, modes)
    by_mode = dict(zip(modes, networks, strict=True))
    for batch_size in batch_sizes:
        reports = measure_modes(
            dense, staged, modes,
            batch_size=batch_size, repeats=repeats, steps=[s for _, s in counts],
            networks=networks, advance=advance,
        )  # fmt: skip
        peaks = _peaks(by_mode, dense, batch_size, weights)
        for count, per_mode in zip(steps, reports, strict=True):
            latencies += per_mode
            for report in per_mode:
                rows += _rows(report, count, peaks.get(report.mode, {}))
    found = _where(by_mode, dense, staged, batch_sizes[0], tell) if where else []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return BenchReport(
        model=model,
        device=name,
        dtype=str(leading_parameter(dense).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        repeats=repeats,
        versions={"torch": torch.__version__, "diffusers": diffusers.__version__,
                  "python": platform.python_version()},
        rows=rows,
        latencies=latencies,
        time=found,
        memory=_memory(dense, staged),
    )  # fmt: skip


def _memory(dense: nn.Module, staged: StagedDenoiser) -> dict[str, Any]:
    """State and measure what the stages take, all resident and swapped, in the largest stage."""
    measured = {"dense": measure_memory(dense).to_dict(),
                "resident": measure_memory(staged).to_dict()}  # fmt: skip
    staged.set_stage_memory("swap")
    try:
        swap = staged.swap
        assert swap is not None
        found = []
        for number in range(len(staged.stage_models)):
            swap.activate(number)
            found.append(measure_memory(staged))
        largest = max(found, key=lambda memory: sum(memory.live.values()))
        measured["swap"] = largest.to_dict()
    finally:
        staged.set_stage_memory("resident")
    parameters = {"dense": denoiser_size(dense)[0], "pruned": denoiser_size(staged)[0]}
    stated = state_memory(staged).to_dict()
    return {"parameters": parameters, "stated": stated, "measured": measured}


def _steps_of_stages(staged: StagedDenoiser, scheduler: Any, count: int) -> list[int]:
    """Count the steps of each stage in a run; the plan's own where it was made for as many."""
    if count == sum(staged.info.steps):
        return list(staged.info.steps)
    most = getattr(scheduler, "config", {}).get("num_train_timesteps", count)
    if count > most:
        raise ValueError(
            f"bench: steps must be at most {most}, the timesteps the model was trained on, got "
            f"{count}."
        )
    own = copy.deepcopy(scheduler)
    start_steps(own, count, sampling_of(staged.adapter, staged.stage_models[0]))
    return staged.division.count_steps(step_log_snr(own))


def _peaks(
    by_mode: ModeNetworks,
    dense: nn.Module,
    batch_size: int,
    weights: dict[str, int],
) -> dict[str, dict[str, int]]:
    """Return bytes by mode and network; modes that keep their memory to themselves are left out."""
    device = leading_parameter(dense).device
    found = {}
    for mode, networks in by_mode.items():
        if mode not in ("eager", "fused") and device.type != "cuda":
            continue
        took = []
        for call in denoiser_calls(adapter_for(dense), networks, batch_size):
            with torch.no_grad():
                call()  # joins weights, chooses kernels: memory of a first call only
                took.append(peak_bytes(call, device))
        found[mode] = {"dense": weights["dense"] + took[0],
                       "pruned": weights["pruned"] + max(took[1:])}  # fmt: skip
    return found


def _rows(report: LatencyReport, steps: int, peaks: dict[str, int]) -> list[BenchRow]:
    of_dense, of_pruned = report.over_eager

    def row(
        network: str, spent: float, fewer: tuple[float, float], speedup: float, over_eager: float
    ) -> BenchRow:
        return BenchRow(
            mode=report.mode,
            network=network,
            batch_size=report.batch_size,
            steps=steps,
            milliseconds=spent,
            milliseconds_per_image=spent * steps / report.batch_size,
            macs=report.dense.macs / fewer[0],
            macs_with_attention=report.dense.macs_with_attention / fewer[1],
            peak_bytes=peaks.get(network),
            speedup=speedup,
            macs_ratio=fewer[1],
            efficiency=speedup / fewer[1],
            over_eager=over_eager,
        )

    fewer = report.macs_ratio_without_attention, report.macs_ratio
    return [
        row("dense", report.dense.milliseconds, (1.0, 1.0), 1.0, of_dense),
        row("pruned", report.milliseconds, fewer, report.speedup, of_pruned),
    ]


def _where(
    by_mode: ModeNetworks,
    dense: nn.Module,
    staged: StagedDenoiser,
    batch_size: int,
    tell: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    device = leading_parameter(dense).device
    weight = [count / sum(staged.info.steps) for count in staged.info.steps]
    # What a compiled function or a graph does inside has other names on every machine.
    seen = [mode for mode in by_mode if mode in ("eager", "fused")]
    found: list[dict[str, Any]] = []
    for number, mode in enumerate(seen):
        with torch.no_grad():
            spent: list[TimeSpent] = [
                time_spent(call, device)
                for call in denoiser_calls(adapter_for(dense), by_mode[mode], batch_size)
            ]
        for network, one in (("dense", spent[0]), ("pruned", mean_spent(spent[1:], weight))):
            found.append({"mode": mode, "network": network, "batch_size": batch_size}
                         | one.to_dict())  # fmt: skip
        tell("profile", number + 1, len(seen))
    return found
