"""Speed of denoiser calls, dense beside pruned in every mode, against what the arithmetic allows.

    python -m benchmarks.bench_speed                    # the cases for a CPU
    python -m benchmarks.bench_speed --models dit-b-4
    python -m benchmarks.bench_speed --device cuda --dtype bfloat16

Rows go to `benchmarks/results/speed.csv`: medians of calls in turn in one run. The efficiency is
the speed-up over the dense network in the same mode, over the ratio of MACs with attention
products (1 is the floor reached); `dense_over_eager` and `over_eager` are the speed-ups of the
dense and the pruned network over the dense one as diffusers runs it.
"""

import argparse
from typing import Any

import torch

from benchmarks.rows import RESULTS, provenance, upsert_row
from mosaicdiff import PruneConfig
from mosaicdiff.evaluate.configurations import random_denoiser, random_staged
from mosaicdiff.evaluate.latency import MODES, LatencyReport, measure_modes
from mosaicdiff.pipeline import cut
from mosaicdiff.sources import find_denoiser, load_pipeline

FILE = RESULTS / "speed.csv"
KEY = ("model", "mode", "sparsity", "round_to", "batch_size", "device", "dtype", "threads")
#: Sparsity, rows of a call, repeats.
ON_CPU = {"dit-xl-2": (0.33, (4,), 5), "dit-b-4": (0.33, (8,), 15), "digits": (0.3, (64,), 40)}
ON_CUDA = {"dit-xl-2": (0.33, (1, 8, 32), 30), "sdxl": (0.33, (1, 8), 10)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=tuple(ON_CPU | ON_CUDA))
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--round-to", default="64", help="kept neurons, not of digits; or auto")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    cases = ON_CPU if device.type == "cpu" else ON_CUDA
    modes = args.modes or (
        ["eager", "fused"]
        if device.type == "cpu"
        else ["eager", "fused", "compiled", "graphs", "compiled-graphs"]
    )
    for model in args.models or cases:
        sparsity, batch_sizes, repeats = cases.get(model) or (ON_CPU | ON_CUDA)[model]
        round_to: Any = 1 if model == "digits" else args.round_to
        dense, staged = _pair(model, sparsity, round_to, device, dtype)
        for batch_size in batch_sizes:
            (reports,) = measure_modes(dense, staged, modes, batch_size=batch_size, repeats=repeats)
            for report in reports:
                row = {"model": model, "sparsity": sparsity, "round_to": round_to}
                upsert_row(FILE, KEY, row | _row(report) | provenance())
                print(
                    f"{model} {report.mode}, {batch_size} rows: {report.speedup:.3f}x for "
                    f"{report.macs_ratio:.3f}x fewer MACs, efficiency {report.efficiency:.3f}; "
                    f"{report.over_eager[1]:.3f}x over eager dense",
                    flush=True,
                )


def _pair(model: str, sparsity: float, round_to: Any, device: Any, dtype: Any) -> tuple[Any, Any]:
    number = round_to if round_to == "auto" else int(round_to)
    config = PruneConfig(sparsity=sparsity, round_to=number, allocation="score")
    if model == "digits":
        pipe = load_pipeline("digits", dtype, device)
        dense = find_denoiser(pipe)[1]
        return dense, cut(dense, config, scheduler=pipe.scheduler)
    dense = random_denoiser(model, device, dtype)
    return dense, random_staged(dense, config)


def _row(report: LatencyReport) -> dict[str, Any]:
    return {
        "mode": report.mode,
        "batch_size": report.batch_size,
        "dtype": report.dtype,
        "repeats": report.repeats,
        "dense_ms": report.dense.milliseconds,
        "dense_p20": report.dense.p20,
        "dense_p80": report.dense.p80,
        "pruned_ms": report.milliseconds,
        "stage_ms": " ".join(f"{stage.milliseconds:.2f}" for stage in report.stages),
        "stage_steps": " ".join(str(stage.steps) for stage in report.stages),
        "gmacs_dense": report.dense.macs_with_attention / 1e9,
        "speedup": report.speedup,
        "macs_ratio": report.macs_ratio,
        "efficiency": report.efficiency,
        "dense_over_eager": report.over_eager[0],
        "over_eager": report.over_eager[1],
    }


if __name__ == "__main__":
    main()
