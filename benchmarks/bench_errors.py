"""Layer error of ours beside re-inversion in rounds, at four sparsities, in float32.

    python -m benchmarks.bench_errors                  # embedded model and synthetic layers
    python -m benchmarks.bench_errors --layers 4       # fewer of each

The layers: the readers of the embedded model in three stages, and synthetic ones of 512 columns
whose H has condition number 1e8. The error is trace(D H D^T) / trace(W H W^T) in float64,
D = W - W'. Rows go to `benchmarks/results/errors.csv`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.baselines import reinversion
from benchmarks.layers import Layer, conditioned_layer, embedded_layers, layer_error
from benchmarks.rows import RESULTS, provenance, upsert_row
from mosaic_kernels import compensate, prune_columns

KEY = ("layers", "sparsity")
SPARSITIES = (0.1, 0.3, 0.5, 0.7)


def synthetic_layers(count: int) -> list[Layer]:
    """Return layers of 512 columns, condition number 1e8, every other one with groups of 8."""
    result = []
    for seed in range(count):
        weight, h = conditioned_layer(128, 512, seed=seed)
        result.append(
            Layer(f"condition 1e8, {seed}", weight.float(), h.float(), 1 + 7 * (seed % 2))
        )
    return result


def error_ratio(layer: Layer, sparsity: float) -> float:
    """Return the layer error of ours over that of re-inversion; 1 where both lose nothing."""
    n = layer.h.shape[0]
    count = round(sparsity * n / layer.group_size)
    trajectory = prune_columns(layer.weight, layer.h, group_size=layer.group_size, count=count)
    kept = trajectory.kept(count)
    fitted = compensate(layer.weight, layer.h, kept, damping=float(trajectory.damping[0]))
    other, theirs = reinversion(layer.weight, layer.h, count, group_size=layer.group_size)
    ours_error = layer_error(layer.weight, fitted, layer.h, kept)
    theirs_error = layer_error(layer.weight, theirs, layer.h, other)
    return ours_error / theirs_error if theirs_error > 0 else 1.0


def summary(layers: Sequence[Layer], sparsity: float) -> tuple[float, float, float]:
    """Return the geometric mean, the least and the largest ratio over some layers."""
    ratios = torch.tensor([error_ratio(layer, sparsity) for layer in layers], dtype=torch.float64)
    return float(ratios.log().mean().exp()), float(ratios.min()), float(ratios.max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, help="of each kind; the default is all, and 8")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args()
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers must be at least 1, got {args.layers}.")
    kinds = {
        "embedded": embedded_layers()[: args.layers],
        "condition 1e8": synthetic_layers(args.layers or 8),
    }
    for name, layers in kinds.items():
        for sparsity in SPARSITIES:
            mean, least, largest = summary(layers, sparsity)
            row = {
                "layers": name,
                "sparsity": sparsity,
                "count": len(layers),
                "ratio_mean": mean,
                "ratio_min": least,
                "ratio_max": largest,
            }
            upsert_row(args.results / "errors.csv", KEY, row | provenance())
            print(f"{name:16} {sparsity:.0%}: {mean:.4f} ({least:.4f}..{largest:.4f})")


if __name__ == "__main__":
    main()
