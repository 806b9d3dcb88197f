"""Elimination of heads that two readers share, beside re-inversion and beside each alone.

    python -m benchmarks.bench_joint --device cpu      # one attention of SD3.5-Large, 30%
    python -m benchmarks.bench_joint --heads 24 --repeats 5

Providers: ours; the same choice with a fresh inverse for every head; each reader alone by
`prune_columns`, which may choose other heads. All end with the least squares of what is kept. The
error is the two layers', as a share of their energy, in float64. The floor: two inverses, W^T W,
the updates of A and G to the last head removed, and the solves, over the measured rate of a matrix
product. Rows go to `benchmarks/results/<device>.csv`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench_prune import operations
from benchmarks.layers import correlated_layer, layer_error
from benchmarks.timing import parser, product_rate, record, start, time_in_turn
from mosaic_kernels import cholesky_inverse, compensate, prune_columns, prune_columns_joint
from mosaic_kernels.ref import fused_choice_ref

#: SD3.5-Large: 38 heads of 64.
HEADS, WIDTH, DAMPING = 38, 64, 0.01

Result = list[tuple[Tensor, Tensor]]


def ours(weights: list[Tensor], hs: list[Tensor], count: int) -> Result:
    """Return the kept columns and the weights that are left, for each reader."""
    found = prune_columns_joint(weights, hs, group_size=WIDTH, count=count, damping=DAMPING)
    kept = found.kept(count)
    return [
        (kept, compensate(w, h, kept, damping=float(used)))
        for w, h, used in zip(weights, hs, found.damping[0], strict=True)
    ]


def alone(weights: list[Tensor], hs: list[Tensor], count: int) -> Result:
    """Prune each reader by itself."""
    results = []
    for w, h in zip(weights, hs, strict=True):
        found = prune_columns(w, h, group_size=WIDTH, count=count, damping=DAMPING)
        kept = found.kept(count)
        results.append((kept, compensate(w, h, kept, damping=DAMPING)))
    return results


def reinverted(weights: list[Tensor], hs: list[Tensor], count: int) -> Result:
    """Invert what is left of each H before every head, and refit."""
    left = list(range(hs[0].shape[0] // WIDTH))
    offsets = torch.arange(WIDTH, device=hs[0].device)
    for _ in range(count):
        groups = torch.tensor(left, device=hs[0].device)
        kept = (groups[:, None] * WIDTH + offsets).flatten()
        losses = []
        for w, h in zip(weights, hs, strict=True):
            inverse = cholesky_inverse(h[kept][:, kept], damping=DAMPING)[0]
            fitted = compensate(w, h, kept, damping=DAMPING).unflatten(1, (-1, WIDTH))
            blocks = inverse.unflatten(0, (-1, WIDTH)).unflatten(2, (-1, WIDTH))
            diagonal = torch.stack([blocks[i, :, i] for i in range(len(left))])
            squares = torch.einsum("mgi,mgj->gij", fitted, fitted)
            solved = torch.linalg.solve(diagonal, squares)
            losses.append(solved.diagonal(dim1=1, dim2=2).sum(1).tolist())
        left.pop(fused_choice_ref(losses))
    kept = (torch.tensor(left, device=hs[0].device)[:, None] * WIDTH + offsets).flatten()
    return [
        (kept, compensate(w, h, kept, damping=DAMPING)) for w, h in zip(weights, hs, strict=True)
    ]


def main() -> None:
    options = parser(__doc__ or "", repeats=5)
    options.add_argument("--heads", type=int, default=HEADS, help="of 64 columns (38)")
    options.add_argument("--sparsity", type=float, default=0.3, help="below 1 (0.3)")
    args = options.parse_args()
    device = start(options, args)
    if not 0 <= args.sparsity < 1:
        options.error(f"--sparsity must be at least 0 and below 1, got {args.sparsity}.")
    n, count = args.heads * WIDTH, int(args.sparsity * args.heads)
    pairs = [correlated_layer(n, n, device, seed) for seed in range(2)]
    weights, hs = [w for w, _ in pairs], [h for _, h in pairs]
    runs: dict[str, Callable[[], Result]] = {
        "mosaic": lambda: ours(weights, hs, count),
        "re-inversion for every head": lambda: reinverted(weights, hs, count),
        "each reader alone": lambda: alone(weights, hs, count),
    }
    timings = time_in_turn(runs, device, args.repeats)
    errors = {}
    for name, run in runs.items():
        found = run()
        errors[name] = sum(
            layer_error(w, fitted, h, kept)
            for w, h, (kept, fitted) in zip(weights, hs, found, strict=True)
        ) / len(found)
    floor = 2 * operations(n, n, count * WIDTH) / product_rate(device, torch.float32) * 1e3
    case = f"{args.heads} heads of {WIDTH}, two readers, {args.sparsity:.0%}"
    record("prune_columns_joint", case, torch.float32, device, timings, floor, errors)


if __name__ == "__main__":
    main()
