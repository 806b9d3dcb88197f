"""Dense beside pruned over guidance scales, on the embedded model: equal guidance, and each's best.

python -m benchmarks.bench_guidance
"""

import argparse
from functools import partial

import mosaicdiff
from benchmarks.rows import RESULTS, provenance, upsert_row
from mosaicdiff.evaluate import Evaluation, Judges, compare
from mosaicdiff.evaluate.networks import DigitsNetwork
from mosaicdiff.evaluate.reference import load_reference

FILE = RESULTS / "guidance.csv"
KEY = ("images", "steps", "seed", "sparsity", "guidance")
SPARSITIES = (0.3, 0.5)
SCALES = (1.0, 1.25, 1.5, 2.0)


def keep_rows(result: Evaluation, sparsity: float, origin: dict[str, str]) -> None:
    """Write the rows of an evaluation; the dense model's have sparsity 0."""
    for row in result.rows:
        figures = {name: float(value) for name, value in row.metrics.items()}
        upsert_row(
            FILE,
            KEY,
            {
                "images": result.setting.num_images,
                "steps": result.setting.steps,
                "seed": result.setting.seed,
                "sparsity": f"{sparsity if row.model == 'pruned' else 0.0:g}",
                "guidance": f"{row.guidance_scale:g}",
                "passes": row.passes_per_image,
                "macs": row.macs_per_image,
                "macs_with_attention": row.macs_with_attention_per_image,
                **figures,
                **origin,
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    origin = provenance()
    network = DigitsNetwork()
    judges = Judges(network, partial(load_reference, None, network))
    dense = mosaicdiff.load_pipeline("digits")
    measured = mosaicdiff.calibrate(mosaicdiff.load_pipeline("digits"))
    for sparsity in SPARSITIES:
        pruned = mosaicdiff.load_pipeline("digits")
        mosaicdiff.prune(pruned, mosaicdiff.PruneConfig(sparsity=sparsity), measured=measured)
        result = compare(
            dense, pruned, judges=judges, num_images=arguments.images, steps=arguments.steps,
            guidance_scales=SCALES, seed=arguments.seed, batch_size=125,
        )  # fmt: skip
        keep_rows(result, sparsity, origin)
        for row in result.rows:
            print(sparsity, row.model, row.guidance_scale, dict(row.metrics), flush=True)


if __name__ == "__main__":
    main()
