"""Quality of `digits` under pruning: one factor at a time, the headline rows, and the cap.

    python -m benchmarks.bench_quality table       # 512 images, guidance 1, every factor
    python -m benchmarks.bench_quality headline    # 2,000 images, guidance 1 and 1.5, three seeds
    python -m benchmarks.bench_quality cap         # the cap on a stage's sparsity
    python -m benchmarks.bench_quality trial       # ours beside magnitude on 200 images

Rows go to `benchmarks/results/quality.csv`. Sampling runs under bf16 autocast, dense and pruned
alike (against float32 it moved pictures by a squared error of 3e-5); calibration and pruning run
in float32. Pruned and dense pictures have the same noise; the seed is that of calibration too.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.progress import Progress

from benchmarks.rows import RESULTS, provenance, upsert_row
from mosaicdiff import PruneConfig, prune
from mosaicdiff.allocation.planning import step_scores
from mosaicdiff.allocation.shares import stage_shares
from mosaicdiff.evaluate import DigitsJudge, sample_images
from mosaicdiff.evaluate.sampling import balanced_labels
from mosaicdiff.inputs.load import load_calibration
from mosaicdiff.pipeline import plan
from mosaicdiff.sources import load_pipeline
from mosaicdiff.trajectory.schedule import NoiseSchedule, step_log_snr
from mosaicdiff.trajectory.stages import stage_means

FILE = RESULTS / "quality.csv"
KEY = (
    "sparsity", "criterion", "compensation", "allocation", "max_sparsity", "images",
    "guidance", "seed",
)  # fmt: skip
SPARSITIES = (0.1, 0.2, 0.3, 0.5)
DEFAULT = ("obs", "plain", "score")
FACTORS = [
    DEFAULT,
    ("magnitude", "plain", "score"),
    ("wanda", "plain", "score"),
    ("random", "plain", "score"),
    ("obs", "none", "score"),
    ("obs", "affine", "score"),
    ("obs", "plain", "equal"),
    ("obs", "plain", "inverse"),
    ("obs", "plain", "one network"),
    ("magnitude", "none", "score"),
    ("magnitude", "none", "one network"),
    ("wanda", "none", "one network"),
]
HEADLINE = [
    DEFAULT,
    ("obs", "plain", "equal"),
    ("obs", "plain", "one network"),
    ("magnitude", "none", "score"),
]


class Study:
    """Prune and judge variants of the embedded model; dense pictures are made once a setting."""

    def __init__(self) -> None:
        self.judge = DigitsJudge()
        self.pipe = load_pipeline("digits")
        self.data = load_calibration(None, self.pipe)
        self.dense: dict[tuple, torch.Tensor] = {}

    def sample(self, pipe, images: int, guidance: float, seed: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            labels = balanced_labels(images, 10)
            return sample_images(pipe, labels, guidance_scale=guidance, seed=seed, batch_size=250)[
                0
            ]

    def judge_dense(self, images: int, guidance: float, seed: int) -> None:
        setting = (images, guidance, seed)
        if setting not in self.dense:
            self.dense[setting] = self.sample(self.pipe, images, guidance, seed)
            factors = ("dense", "none", "none")
            self.write(0.0, factors, 0.0, setting, self.dense[setting], {"macs_ratio": 1.0})

    def measure(
        self, sparsity: float, factors: tuple, images: int, guidances, seed: int, cap=None
    ) -> None:
        """Prune once, sample at every guidance, and write a row for each."""
        config = self.configure(sparsity, factors, seed, cap)
        pipe = load_pipeline("digits")
        result = prune(pipe, config, calibration=self.data)
        report = result.report
        extra = {
            "macs_ratio": report.macs_dense_with_attention / report.macs_with_attention,
            "shares": " ".join(f"{stage.sparsity:.3f}" for stage in report.stages),
            "reached": report.sparsity,
            "prune_seconds": report.seconds,
        }
        for guidance in guidances:
            setting = (images, guidance, seed)
            self.judge_dense(*setting)
            pictures = self.sample(pipe, *setting)
            self.write(sparsity, factors, config.max_sparsity, setting, pictures, extra)

    def configure(self, sparsity: float, factors: tuple, seed: int, cap) -> PruneConfig:
        criterion, compensation, allocation = factors
        config = PruneConfig(
            sparsity=sparsity, criterion=criterion, compensation=compensation, seed=seed,
            allocation="score",
            max_sparsity=PruneConfig.max_sparsity if cap is None else cap,
        )  # fmt: skip
        if allocation == "equal":
            return replace(config, allocation="uniform")
        if allocation == "one network":
            return replace(config, stages=1)
        if allocation == "inverse":
            shares = self.inverse_shares(config)
            return replace(config, sparsity=None, allocation="explicit", stage_sparsity=shares)
        return config

    def inverse_shares(self, config: PruneConfig) -> tuple[float, ...]:
        """Give in proportion to the score instead of what it lacks to 1: the wrong way round."""
        final = plan(self.pipe, config, calibration=self.data)
        latents = torch.cat([latent for latent, _ in self.data])
        power = float(latents.double().square().mean())
        sampler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        sampler.set_timesteps(config.steps)
        schedule = NoiseSchedule.from_scheduler(sampler)
        visited = step_log_snr(sampler)
        scores = step_scores(schedule, visited, power, config.snr_weight)
        means = [max(0.0, m) for m in stage_means(final.division, scores, visited)]
        return tuple(stage_shares(means, final.steps, config.sparsity, 0.95))

    def write(self, sparsity, factors, cap, setting, pictures, extra) -> None:
        images, guidance, seed = setting
        labels = torch.tensor(balanced_labels(images, 10))
        error = (pictures - self.dense[setting]).double().square().mean()
        criterion, compensation, allocation = factors
        row = {
            "sparsity": sparsity, "criterion": criterion, "compensation": compensation,
            "allocation": allocation, "max_sparsity": cap, "images": images,
            "guidance": guidance, "seed": seed, **self.judge.score(pictures, labels),
            "mse_to_dense": float(error), **extra, **provenance(),
        }  # fmt: skip
        upsert_row(FILE, KEY, row)


def jobs_of(part: str, sparsities: Sequence[float]) -> list[dict]:
    """List what a part measures; `sparsities` are those of the table."""
    if part == "headline":
        return [
            {"sparsity": 0.3, "factors": f, "images": 2000, "guidances": (1.0, 1.5), "seed": seed}
            for seed in (0, 1, 2)
            for f in HEADLINE
        ]
    one = {"images": 512, "guidances": (1.0,), "seed": 0}
    if part == "cap":
        return [
            {"sparsity": s, "factors": DEFAULT, "cap": cap, **one}
            for s in (0.5, 0.6)
            for cap in (0.7, 0.75, 0.8, 0.85, 0.95)
        ]
    if part == "trial":
        one["images"] = 200
        return [
            {"sparsity": 0.3, "factors": f, **one}
            for f in (DEFAULT, ("magnitude", "none", "score"))
        ]
    return [{"sparsity": s, "factors": f, **one} for s in sparsities for f in FACTORS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("table", "headline", "cap", "trial"))
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES, help="of table")
    args = parser.parse_args()
    study = Study()
    with Progress() as progress:
        jobs = jobs_of(args.part, args.sparsities)
        task = progress.add_task(args.part, total=len(jobs))
        for job in jobs:
            progress.update(task, description=f"{args.part} {job['sparsity']} {job['factors']}")
            study.measure(**job)
            progress.advance(task)


if __name__ == "__main__":
    main()
