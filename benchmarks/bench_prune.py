"""Column elimination, from H to the weights that are left, beside the published way.

    python -m benchmarks.bench_prune --device cpu          # one layer of 4608 columns, 30%
    python -m benchmarks.bench_prune --device cuda         # and all of DiT-XL/2, 3 stages
    python -m benchmarks.bench_prune --columns 1152 --rows 288 --repeats 5

Providers: ours (inverse, elimination, least squares); re-inversion in 16 rounds, as the OBS-Diff
paper describes it; one-shot masks by the same criterion, without compensation. The error is the
layer's, as a share of its energy, in float64. The floor: the operations of the inverse, W^T W,
the updates of A and G and the solve, over the measured rate of a matrix product. Rows go to
`benchmarks/results/<device>.csv`.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.baselines import one_shot_mask, reinversion
from benchmarks.layers import correlated_layer, layer_error
from benchmarks.timing import parser, product_rate, record, start, synchronize, time_in_turn
from mosaic_kernels import compensate, prune_columns

#: DiT-XL/2: 28 blocks, FFN readers of 4608 columns, attention readers of 16 heads of 72.
STAGES, BLOCKS, ROWS, NEURONS, HEADS, HEAD_WIDTH = 3, 28, 1152, 4608, 16, 72


def operations(m: int, n: int, count: int) -> float:
    """Return the operations, two per multiply-add, that the elimination cannot do without."""
    left = n - count
    updates = 3.0 * (n**3 - left**3) / 3  # of half of A by one product, half of G by two
    solve = 2.0 * m * count * left + left**3 / 3 + 2.0 * m * left**2
    return n**3 + m * n * (n + 1.0) + updates + solve


def ours(weight: Tensor, h: Tensor, count: int, group_size: int = 1) -> tuple[Tensor, Tensor]:
    """Return the kept columns and the weights that are left of one layer."""
    trajectory = prune_columns(weight, h, group_size=group_size, count=count)
    kept = trajectory.kept(count)
    return kept, compensate(weight, h, kept, damping=float(trajectory.damping[0]))


def peak_floats(run: Callable[[], object], device: torch.device) -> float:
    """Return the most memory that ``run`` takes beyond what is there, in float32 numbers."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 4
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    # What freed arrays have left resident would hide as much of what is allocated now.
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the peak starts again from what is resident now
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 4


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"bench_prune: /proc/self/status must have a line {name}, got none.")


def bench_layer(m: int, n: int, sparsity: float, device: torch.device, repeats: int) -> None:
    """Measure one layer."""
    weight, h = correlated_layer(m, n, device)
    count = int(sparsity * n)
    runs: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "mosaic": lambda: ours(weight, h, count),
        "re-inversion, 16 rounds": lambda: reinversion(weight, h, count),
        "one-shot mask": lambda: one_shot_mask(weight, h, count),
    }
    timings = time_in_turn(runs, device, repeats)
    errors, extra = {}, {}
    for name, run in runs.items():
        kept, fitted = run()
        errors[name] = layer_error(weight, fitted, h, kept)
        extra[name] = {"peak_n2_floats": 1 + peak_floats(run, device) / n**2}  # and H itself
    floor = operations(m, n, count) / product_rate(device, torch.float32) * 1e3
    case = f"n={n} m={m} {sparsity:.0%}"
    record("prune_columns", case, torch.float32, device, timings, floor, errors, extra)
    for name in runs:
        print(f"{name:32} peak memory {extra[name]['peak_n2_floats']:.2f} n^2 floats with H")


def bench_model(device: torch.device, sparsity: float, repeats: int) -> None:
    """Measure all readers of DiT-XL/2 in three stages, batched by shape, beside one by one."""
    ffn = [correlated_layer(ROWS, NEURONS, device, seed) for seed in range(2)]
    attention = [correlated_layer(ROWS, ROWS, device, seed) for seed in range(2)]
    layers = STAGES * BLOCKS

    def batch(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        chosen = [pairs[i % len(pairs)] for i in range(layers)]
        return torch.stack([w for w, _ in chosen]), torch.stack([h for _, h in chosen])

    groups = [(*batch(ffn), 1, int(sparsity * NEURONS))]
    groups.append((*batch(attention), HEAD_WIDTH, int(sparsity * HEADS)))

    def run_ours() -> None:
        for weight, h, group_size, count in groups:
            trajectory = prune_columns(weight, h, group_size=group_size, count=count)
            for i, used in enumerate(trajectory.damping.tolist()):
                compensate(weight[i], h[i], trajectory.kept(count, i), damping=used)

    def run_baseline() -> None:
        for weight, h, group_size, count in groups:
            for i in range(layers):
                reinversion(weight[i], h[i], count, group_size=group_size)

    runs = {"mosaic": run_ours, "re-inversion, 16 rounds": run_baseline}
    floor = layers * (
        operations(ROWS, NEURONS, int(sparsity * NEURONS))
        + operations(ROWS, ROWS, int(sparsity * HEADS) * HEAD_WIDTH)
    )
    floor_ms = floor / product_rate(device, torch.float32) * 1e3
    case = f"DiT-XL/2, {STAGES} stages, {sparsity:.0%}"
    timings = time_in_turn(runs, device, repeats)
    record("prune_columns", case, torch.float32, device, timings, floor_ms, {})


def main() -> None:
    options = parser(__doc__ or "", repeats=5)
    options.add_argument("--columns", type=int, default=NEURONS, help="of the layer (4608)")
    options.add_argument("--rows", type=int, default=ROWS, help="of the layer (1152)")
    options.add_argument("--sparsity", type=float, default=0.3, help="below 1 (0.3)")
    args = options.parse_args()
    device = start(options, args)
    if not 0 <= args.sparsity < 1:
        options.error(f"--sparsity must be at least 0 and below 1, got {args.sparsity}.")
    bench_layer(args.rows, args.columns, args.sparsity, device, args.repeats)
    if device.type == "cuda":
        bench_model(device, 0.33, 1)  # the baseline alone takes a minute or more


if __name__ == "__main__":
    main()
