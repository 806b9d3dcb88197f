"""Speed of one denoiser call, dense beside pruned, against what the arithmetic allows.

    python -m benchmarks.bench_speed                    # all configurations
    python -m benchmarks.bench_speed --models dit-b-4

Rows go to `benchmarks/results/speed.csv`: medians of calls in turn, and the efficiency, which is
the speed-up over the ratio of MACs with attention products (1 is the floor reached).
"""

import argparse

import torch

from benchmarks.rows import RESULTS, provenance, upsert_row
from mosaicdiff import PruneConfig
from mosaicdiff.evaluate import measure_latency
from mosaicdiff.evaluate.configurations import random_denoiser, random_staged
from mosaicdiff.pipeline import cut
from mosaicdiff.sources import find_denoiser, load_pipeline

FILE = RESULTS / "speed.csv"
KEY = ("model", "sparsity", "round_to", "batch_size", "device", "dtype", "threads")
#: Sparsity, rows of a call, repeats.
CASES = {"dit-xl-2": (0.33, 2, 3), "dit-b-4": (0.33, 8, 15), "digits": (0.3, 64, 40)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--round-to", type=int, default=64, help="kept neurons, not of digits")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    for model in args.models:
        sparsity, batch_size, repeats = CASES[model]
        round_to = 1 if model == "digits" else args.round_to
        config = PruneConfig(sparsity=sparsity, round_to=round_to, allocation="score")
        if model == "digits":
            pipe = load_pipeline("digits", dtype, device)
            dense = find_denoiser(pipe)[1]
            staged = cut(dense, config, scheduler=pipe.scheduler)
        else:
            dense = random_denoiser(model, device, dtype)
            staged = random_staged(dense, config)
        report = measure_latency(dense, staged, batch_size=batch_size, repeats=repeats)
        row = {
            "model": model,
            "sparsity": sparsity,
            "round_to": round_to,
            "batch_size": batch_size,
            "dtype": args.dtype,
            "repeats": repeats,
            "dense_ms": report.dense.milliseconds,
            "dense_p20": report.dense.p20,
            "dense_p80": report.dense.p80,
            "stage_ms": " ".join(f"{stage.milliseconds:.2f}" for stage in report.stages),
            "stage_steps": " ".join(str(stage.steps) for stage in report.stages),
            "gmacs_dense": report.dense.macs_with_attention / 1e9,
            "speedup": report.speedup,
            "macs_ratio": report.macs_ratio,
            "efficiency": report.efficiency,
        }
        upsert_row(FILE, KEY, row | provenance())
        print(
            f"{model}: {report.speedup:.3f}x for {report.macs_ratio:.3f}x fewer MACs, "
            f"efficiency {report.efficiency:.3f}"
        )


if __name__ == "__main__":
    main()
