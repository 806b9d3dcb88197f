"""Hessian updates H += w X^T X: ours beside torch's whole product and the published way.

    python -m benchmarks.bench_hessian --device cpu        # 4,096 tokens
    python -m benchmarks.bench_hessian --device cuda       # 32,768 tokens
    python -m benchmarks.bench_hessian --columns 1152 --tokens 2048 --dtypes float32

Providers: ours; ours with compensated sums, which is what calibration uses; one torch product with
float32 sums, added to H; an upcast and a scaled copy and a float32 product, as OBS-Diff and
SparseGPT do. The error is that of 64 rows of H in float64, relative in the Frobenius norm. The
floor: tokens * n * (n + 1) operations over the measured rate of a product of that type, or one
read of X. Inputs take turns, so that no cache holds them. Rows go to
`benchmarks/results/<device>.csv`.
"""

from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.baselines import hessian_mm_, hessian_upcast_
from benchmarks.timing import copy_bandwidth, parser, product_rate, record, start, time_in_turn
from mosaic_kernels import hessian_update_

WEIGHT = 0.75
TOKENS = {"cpu": 4096, "cuda": 32768}
DTYPES = ("bfloat16", "float16", "float32")
INPUTS = 3  # of 300 MB each at 4608 columns, 32,768 tokens: more than an L2 cache


def update(h: Tensor, x: Tensor) -> None:
    """Add to H, plainly."""
    hessian_update_(h, x, WEIGHT)


def update_compensated(h: Tensor, x: Tensor) -> None:
    """Add to H and keep what rounding takes; the residual's own values are thrown away."""
    hessian_update_(h, x, WEIGHT, residual=h.new_zeros(2, h.shape[0]))


def update_mm(h: Tensor, x: Tensor) -> None:
    """Add one whole product."""
    hessian_mm_(h, x, WEIGHT)


def update_upcast(h: Tensor, x: Tensor) -> None:
    """Add the product of an upcast and scaled copy."""
    hessian_upcast_(h, x, WEIGHT)


PROVIDERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "mosaic": update,
    "mosaic, compensated": update_compensated,
    "torch, whole product": update_mm,
    "upcast and scaled copies": update_upcast,
}


def bench(tokens: int, n: int, dtype: torch.dtype, device: torch.device, repeats: int) -> None:
    """Measure one shape and type."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(tokens, n, generator=generator).to(device, dtype) for _ in range(INPUTS)]
    h = torch.zeros(n, n, device=device)
    turns = cycle(inputs)
    runs = {
        name: lambda provider=provider: provider(h, next(turns))
        for name, provider in PROVIDERS.items()
    }
    timings = time_in_turn(runs, device, repeats, inner=5 if device.type == "cuda" else 1)
    rows = torch.randperm(n, generator=generator)[:64].to(device)
    x = inputs[0]
    truth = WEIGHT * (x[:, rows].double().T @ x.double())
    inside = torch.arange(n, device=device) <= rows[:, None]
    errors = {}
    for name, provider in PROVIDERS.items():
        h.zero_()
        provider(h, x)
        difference = torch.where(inside, h[rows].double() - truth, 0)
        errors[name] = float(difference.norm() / torch.where(inside, truth, 0).norm())
    arithmetic = tokens * n * (n + 1) / product_rate(device, dtype)
    reading = x.numel() * x.element_size() / (copy_bandwidth(device) / 2)
    floor = max(arithmetic, reading) * 1e3
    record("hessian_update_", f"tokens={tokens} n={n}", dtype, device, timings, floor, errors)


def main() -> None:
    options = parser(__doc__ or "", repeats=7)
    options.add_argument("--columns", type=int, nargs="+", default=[1152, 4608], help="widths")
    options.add_argument("--tokens", type=int, help="of an update (4096; 32768 on cuda)")
    options.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    args = options.parse_args()
    device = start(options, args)
    tokens = args.tokens or TOKENS[device.type]
    for n in args.columns:
        for dtype in args.dtypes:
            bench(tokens, n, getattr(torch, dtype), device, args.repeats)


if __name__ == "__main__":
    main()
