"""Unstructured and N:M sweeps over columns, beside the published loop and masks alone.

    python -m benchmarks.bench_sweep --device cpu
    python -m benchmarks.bench_sweep --device cuda --batch 28

Providers: ours, from H to the compensated weights; the loop of SparseGPT, column by column in
torch. The error is the layer's, as a share of its energy, in float64. The floor: the operations of
the inverse factor, of the walk and of the products between blocks, over the measured rate of a
matrix product. Rows go to `benchmarks/results/<device>.csv`.
"""

import torch

from benchmarks.baselines_sweep import sparsegpt_torch
from benchmarks.layers import correlated_layer, layer_error
from benchmarks.timing import parser, product_rate, record, start, time_in_turn
from mosaic_kernels import prune_weights

TARGETS = {"50%": {"sparsity": 0.5}, "2:4": {"pattern": (2, 4)}}


def bench(m: int, n: int, batch: int, target: str, device: torch.device, repeats: int) -> None:
    """Measure one target on a batch of layers; the loop takes them one by one."""
    weight, h = correlated_layer(m, n, device)
    weights, hessians = weight.repeat(batch, 1, 1), h.repeat(batch, 1, 1)
    arguments = TARGETS[target]
    results = {}

    def ours() -> None:
        results["mosaic"] = prune_weights(weights, hessians, **arguments).weight[0]

    def loop() -> None:
        for i in range(batch):
            results["SparseGPT, torch"] = sparsegpt_torch(weights[i], hessians[i], **arguments)[0]

    timings = time_in_turn({"mosaic": ours, "SparseGPT, torch": loop}, device, repeats)
    every = torch.arange(n, device=device)
    errors = {name: layer_error(weight, fitted, h, every) for name, fitted in results.items()}
    operations = batch * (2 * n**3 / 3 + m * n * (n + 1.0))
    floor = operations / product_rate(device, torch.float32) * 1e3
    case = f"{batch} x n={n} m={m} {target}"
    record("prune_weights", case, torch.float32, device, timings, floor, errors)


def main() -> None:
    options = parser(__doc__ or "", repeats=3)
    options.add_argument("--columns", type=int, default=4608, help="of a layer (4608)")
    options.add_argument("--rows", type=int, default=1152, help="of a layer (1152)")
    options.add_argument("--batch", type=int, default=1, help="layers (1)")
    args = options.parse_args()
    device = start(options, args)
    for target in TARGETS:
        bench(args.rows, args.columns, args.batch, target, device, args.repeats)


if __name__ == "__main__":
    main()
