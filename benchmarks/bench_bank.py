"""What switching stages costs, in both modes of stage memory, against a run of 50 steps.

    python -m benchmarks.bench_bank                     # digits and dit-xl-2
    python -m benchmarks.bench_bank --models digits

Rows go to `benchmarks/results/bank.csv`: median times of bringing the next stage, of one call of
each stage, and the share of a 50-step run that its switches take. `dit-xl-2` has random weights.
"""

import argparse
import statistics
import time

import torch

from benchmarks.rows import RESULTS, provenance, upsert_row
from mosaicdiff import PruneConfig
from mosaicdiff.evaluate.configurations import random_denoiser, random_staged
from mosaicdiff.groups import leading_parameter
from mosaicdiff.memory.count import measure_memory, state_memory
from mosaicdiff.pipeline import cut
from mosaicdiff.sources import find_denoiser, load_pipeline

FILE = RESULTS / "bank.csv"
KEY = ("model", "sparsity", "batch_size", "mode", "device", "dtype", "threads")
#: Rows of a call, rounds over the stages.
CASES = {"digits": (64, 30), "dit-xl-2": (2, 3)}
SPARSITY = 0.3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - started)


@torch.no_grad()
def measure(staged, batch_size: int, rounds: int) -> dict:
    """Time the switches and the calls of all stages in turn; the first round is not counted."""
    parameter = leading_parameter(staged)
    device, adapter = parameter.device, staged.adapter
    stages = staged.stage_models
    shape = (batch_size, *adapter.latent_shape(stages[0]))
    latents = torch.randn(shape, device=device, dtype=parameter.dtype)
    inputs = adapter.example_inputs(stages[0], batch_size, device)
    times = [s.first + (s.last - s.first) // 2 for s in staged.division.stages]
    switches: list[list[float]] = [[] for _ in stages]
    calls: list[list[float]] = [[] for _ in stages]
    for number in range(rounds + 1):
        for k, timestep in enumerate(times):
            step = torch.full((batch_size,), timestep, device=device)
            switch = milliseconds(lambda k=k: staged.activate_stage(k), device)
            call = milliseconds(
                lambda step=step: adapter.predict(staged, latents, step, inputs), device
            )
            if number:
                switches[k].append(switch)
                calls[k].append(call)
    brought = [statistics.median(row) for row in switches]
    called = [statistics.median(row) for row in calls]
    run = sum(n * ms for n, ms in zip(staged.info.steps, called, strict=True))
    return {
        "switch_ms": " ".join(f"{ms:.4g}" for ms in brought),
        "call_ms": " ".join(f"{ms:.4g}" for ms in called),
        "steps": " ".join(map(str, staged.info.steps)),
        # Of a run, the first stage too is brought: the run before ended in the last.
        "share_of_run": sum(brought) / (sum(brought) + run),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    config = PruneConfig(sparsity=SPARSITY, allocation="score")
    for model in args.models:
        batch_size, rounds = CASES[model]
        if model == "digits":
            pipe = load_pipeline("digits", dtype, device)
            staged = cut(find_denoiser(pipe)[1], config, scheduler=pipe.scheduler)
        else:
            dense = random_denoiser(model, device, dtype)
            for block in dense.transformer_blocks:  # as in the published weights
                block.norm1.emb = dense.transformer_blocks[0].norm1.emb
            staged = random_staged(dense, config)
            del dense
        stated = state_memory(staged)
        for mode in ("resident", "swap"):
            staged.set_stage_memory(mode)
            made = measure(staged, batch_size, rounds)
            memory = measure_memory(staged)
            row = {
                "model": model, "sparsity": SPARSITY, "batch_size": batch_size, "mode": mode,
                "dtype": args.dtype, "rounds": rounds, **made,
                "device_bytes": stated.swap_device if mode == "swap" else stated.resident,
                "host_bytes": memory.bank, "peak_bytes": memory.peak,
                "dense_bytes": stated.dense_distinct,
            }  # fmt: skip
            upsert_row(FILE, KEY, row | provenance())
            print(f"{model}, {mode}: switches {made['share_of_run']:.3%} of 50 steps, "
                  f"{made['switch_ms']} ms")  # fmt: skip


if __name__ == "__main__":
    main()
