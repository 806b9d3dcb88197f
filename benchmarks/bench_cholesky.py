"""Inverses of damped Hessians: ours beside LAPACK's or cuSOLVER's.

    python -m benchmarks.bench_cholesky --device cpu       # 1 x 4608, 4 x 1152
    python -m benchmarks.bench_cholesky --device cuda      # 28 x 4608, 28 x 1152, 84 x 1152

Providers: ours, which damps, checks and inverts a batch; a loop of torch.linalg.cholesky and
torch.cholesky_inverse on matrices that are damped already. The error is relative to the inverse
in float64, in the Frobenius norm. The floor: n^3 operations a matrix over the measured rate of a
matrix product. Rows go to `benchmarks/results/<device>.csv`.
"""

import torch

from benchmarks.baselines import damped, inverse_by_torch
from benchmarks.layers import correlated_layer
from benchmarks.timing import parser, product_rate, record, start, time_in_turn
from mosaic_kernels import cholesky_inverse

CASES = {"cpu": ((1, 4608), (4, 1152)), "cuda": ((28, 4608), (28, 1152), (84, 1152))}


def bench(batch: int, n: int, device: torch.device, repeats: int) -> None:
    """Measure one batch of matrices."""
    sample = [correlated_layer(1, n, device, seed)[1] for seed in range(min(batch, 2))]
    h = torch.stack([sample[i % len(sample)] for i in range(batch)])
    ready = damped(h)
    runs = {
        "mosaic": lambda: cholesky_inverse(h)[0],
        "torch, one by one": lambda: inverse_by_torch(ready),
    }
    timings = time_in_turn(runs, device, repeats)
    truth = torch.cholesky_inverse(torch.linalg.cholesky(damped(h[0].double())))
    errors = {
        name: float((run()[0].double() - truth).norm() / truth.norm()) for name, run in runs.items()
    }
    floor = batch * n**3 / product_rate(device, torch.float32) * 1e3
    record("cholesky_inverse", f"{batch} x n={n}", torch.float32, device, timings, floor, errors)


def main() -> None:
    options = parser(__doc__ or "", repeats=5)
    args = options.parse_args()
    device = start(options, args)
    for batch, n in CASES[device.type]:
        bench(batch, n, device, args.repeats)


if __name__ == "__main__":
    main()
