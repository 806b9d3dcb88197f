"""Time providers of one operation in turn, in one run, and put rows beside a measured floor."""

from __future__ import annotations

import argparse
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import RESULTS, provenance, upsert_row
from mosaic_kernels import _products

#: Where rows go; ``start`` sets it.
_results = RESULTS
KEY = ("operator", "case", "dtype", "provider", "device", "threads")


def parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks of kernels share."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    result.add_argument("--repeats", type=int, default=repeats, help=f"rounds ({repeats})")
    result.add_argument("--threads", type=int, help="of torch (all cores)")
    result.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the rows (benchmarks/results)"
    )
    return result


def start(options: argparse.ArgumentParser, args: argparse.Namespace) -> torch.device:
    """Check the shared options, apply them, and return the device."""
    global _results
    if args.device not in ("cpu", "cuda"):
        options.error(f"--device must be cpu or cuda, got {args.device}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda needs a CUDA device, and torch sees none. Use --device cpu.")
    for name in ("repeats", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            options.error(f"--{name} must be at least 1, got {value}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    _results = args.results
    return torch.device(args.device)


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it runs behind the host."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return (time.perf_counter() - begin) * 1e3


def time_in_turn(
    providers: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    inner: int = 1,
) -> dict[str, Timing]:
    """Time each provider ``repeats`` times, one after the other in every round.

    Args:
        providers: functions without arguments, by name; each warms up once.
        device: what they run on.
        repeats: rounds.
        inner: calls in one measurement; on CUDA several, so that launches overlap with work.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    for run in providers.values():
        run()
    for _ in range(repeats):
        for name, run in providers.items():
            taken = _milliseconds(lambda run=run: [run() for _ in range(inner)], device)
            times[name].append(taken / inner)
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> Timing:
    levels = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return Timing(*torch.quantile(torch.tensor(values, dtype=torch.float64), levels).tolist())


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best measured operations per second of a matrix product, two per multiply-add.

    On the CPU the better of torch's and our own, in the type of the sums (float32 for bfloat16
    inputs); on CUDA torch's on random data.
    """
    n = 8192 if device.type == "cuda" else 4096
    work = dtype if device.type == "cuda" or dtype == torch.float64 else torch.float32
    a = torch.randn(n, n, device=device).to(work)
    b = torch.randn(n, n, device=device).to(work)
    runs: dict[str, tuple[Callable[[], object], float]] = {"torch": (lambda: a @ b, 2.0 * n**3)}
    if device.type == "cpu":
        c = torch.zeros(n, n, dtype=work)
        runs["ours"] = (lambda: _products.add_product_lower_(c, (a, a)), 1.0 * n * (n + 1) * n)
    best = 0.0
    for run, operations in runs.values():
        run()
        for _ in range(4):
            best = max(best, operations / _milliseconds(run, device) * 1e3)
    return best


def copy_bandwidth(device: torch.device) -> float:
    """Return the measured bytes per second of a copy, read and written."""
    x = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    best = min(_milliseconds(lambda: y.copy_(x), device) for _ in range(5))
    return 2 * x.numel() * x.element_size() / best * 1e3


def device_file(device: torch.device) -> Path:
    """Return the results file of this device: ``results/nvidia-h200.csv``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {_processor()}"
    return _results / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".csv")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def record(
    operator: str,
    case: str,
    dtype: torch.dtype,
    device: torch.device,
    timings: Mapping[str, Timing],
    floor_ms: float,
    errors: Mapping[str, float],
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Print a table of the providers and put a row for each into the device's results file."""
    first = next(iter(timings))
    print(f"\n{operator} {case} {str(dtype).removeprefix('torch.')} on {device}")
    print(f"{'provider':32} {'ms':>9} {'p20':>9} {'p80':>9} {'floor':>6} {'times':>6} {'error':>9}")
    for name, timing in timings.items():
        row = {
            "operator": operator,
            "case": case,
            "dtype": str(dtype).removeprefix("torch."),
            "provider": name,
            "milliseconds": timing.median,
            "p20": timing.p20,
            "p80": timing.p80,
            "floor_ms": floor_ms,
            "floor_fraction": floor_ms / timing.median,
            "ratio_to_first": timing.median / timings[first].median,
            "error": errors.get(name, float("nan")),
            **((extra or {}).get(name, {})),
        }
        upsert_row(device_file(device), KEY, row | provenance())
        print(
            f"{name:32} {timing.median:9.2f} {timing.p20:9.2f} {timing.p80:9.2f} "
            f"{row['floor_fraction']:6.2f} {row['ratio_to_first']:6.2f} {row['error']:9.2e}"
        )
