"""What `--round-to auto` gains over 1 and 64: one block of DiT-XL/2, 33%, in one run.

    python -m benchmarks.bench_units

Dense and the stages of every rounding run in turn; ratios are taken within a round, so that a busy
machine is busy for all of them. Rows go to `benchmarks/results/units.csv`.
"""

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial

import torch

from benchmarks.rows import RESULTS, provenance, upsert_row
from mosaicdiff import PruneConfig
from mosaicdiff.evaluate import configurations
from mosaicdiff.evaluate.configurations import CONFIGURATIONS, random_denoiser, random_staged

FILE = RESULTS / "units.csv"
KEY = ("model", "round_to", "batch_size", "device", "dtype", "threads")
SPARSITY = 0.33
ROUNDINGS = (1, 64, "auto")


def one_block():
    whole = CONFIGURATIONS["dit-xl-2"]
    return replace(whole, config=dict(whole.config) | {"num_layers": 1})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    configurations.CONFIGURATIONS["dit-xl-2-block"] = one_block()
    dense = random_denoiser("dit-xl-2-block", torch.device("cpu"), torch.float32)
    networks = {}
    for rounding in ROUNDINGS:
        config = PruneConfig(
            sparsity=SPARSITY, round_to=rounding, allocation="score", latency_batch=args.batch_size
        )
        networks[rounding] = random_staged(dense, config)
    adapter = networks[1].adapter
    latents = torch.randn(args.batch_size, *adapter.latent_shape(dense))
    inputs = adapter.example_inputs(dense, args.batch_size, torch.device("cpu"))
    step = torch.full((args.batch_size,), 500)
    calls = {"dense": [(1.0, partial(adapter.predict, dense, latents, step, inputs))]}
    for rounding, staged in networks.items():
        total = sum(staged.info.steps)
        calls[rounding] = [
            (count / total, partial(adapter.predict, model, latents, step, inputs))
            for count, model in zip(staged.info.steps, staged.stage_models, strict=True)
        ]
    rounds = []
    with torch.no_grad():
        for repeat in range(args.repeats + 1):
            names = list(calls) if repeat % 2 else list(reversed(calls))
            took = {name: sum(part * spent(call) for part, call in calls[name]) for name in names}
            if repeat:
                rounds.append(took)
    macs = adapter.macs(dense).total
    for rounding, staged in networks.items():
        gains = sorted(row["dense"] / row[rounding] for row in rounds)
        ratio = macs / staged.mean_macs()[1]
        speedup = statistics.median(gains)
        over_one = statistics.median(row[1] / row[rounding] for row in rounds)
        units = {layer.kind: layer.unit for layer in staged.info.layers}
        upsert_row(FILE, KEY, {
            "model": "one block of dit-xl-2", "sparsity": SPARSITY, "round_to": rounding,
            "units": " ".join(f"{kind}={unit}" for kind, unit in units.items()),
            "batch_size": args.batch_size, "dtype": "float32", "repeats": args.repeats,
            "speedup": speedup, "p20": gains[round(0.2 * (len(gains) - 1))],
            "p80": gains[round(0.8 * (len(gains) - 1))], "macs_ratio": ratio,
            "efficiency": speedup / ratio, "times_as_fast_as_1": over_one,
            "kept": " ".join(
                str(len(kept[layer.name])) if layer.name in kept else str(layer.groups)
                for kept in staged.info.kept for layer in staged.info.layers
            ),
        } | provenance())  # fmt: skip
        print(f"{rounding}: {speedup:.3f}x of {ratio:.3f}x, {over_one:.3f} times as fast as 1")


def spent(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
