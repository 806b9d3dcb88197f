"""What OBS-Diff claims, on `digits`: criteria, timestep weights, packages, step-distilled models.

    python -m benchmarks.bench_obsdiff table      # criterion x granularity, three seeds
    python -m benchmarks.bench_obsdiff inputs     # timestep weights, noised inputs, stages
    python -m benchmarks.bench_obsdiff packages   # P = 1, 2, 4: quality, time, memory
    python -m benchmarks.bench_obsdiff memory     # P = 1, 2, 4 of a DiT-B/4: time, peak memory
    python -m benchmarks.bench_obsdiff student    # a 4-step student, calibrated at its own steps

Rows go to `benchmarks/results/obsdiff.csv`. One network, uniform sparsity, calibrated along 64
trajectories of 50 DDIM steps with OBS-Diff's weights, unless a row says otherwise. Pictures are
sampled as in `bench_quality`; a seed is of calibration and of sampling.
"""

import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from rich.progress import Progress

from benchmarks.bench_quality import Study
from benchmarks.rows import RESULTS, provenance, read_rows, upsert_row
from benchmarks.student import STEPS, load_student
from mosaicdiff import PruneConfig, prune
from mosaicdiff.evaluate import sample_images
from mosaicdiff.evaluate.sampling import balanced_labels
from mosaicdiff.sources import load_pipeline
from mosaicdiff.trajectory_config import TrajectoryConfig

FILE = RESULTS / "obsdiff.csv"
KEY = ("part", "variant", "granularity", "sparsity", "criterion", "images", "seed")
SPARSITIES = (0.3, 0.5, 0.6, 0.7)
PATTERNS = ("2:4", "4:8", "1:4")
ALONG = TrajectoryConfig(samples=64, batch_size=32, guidance_scale=1.0)
#: OBS-Diff's setting, as far as `digits` has it.
BASE = PruneConfig(activations="trajectory", trajectory=ALONG, stages=1, allocation="uniform")
NOISED = {"activations": "noised", "trajectory": TrajectoryConfig()}

#: What changes beside the setting, by name, in the part `inputs`.
INPUTS = {
    "log_decrease": {},
    "uniform weights": {"trajectory": replace(ALONG, weights="uniform")},
    "log_increase": {"trajectory": replace(ALONG, weights="log_increase")},
    "wide log_decrease": {"trajectory": replace(ALONG, weight_range=(0.2, 1.8))},
    "noised inputs": NOISED,
    "3 stages alike, trajectory": {"stages": 3},
    "3 stages by score, noised": {
        **NOISED, "stages": 3, "allocation": "score", "max_sparsity": 0.95,
    },
    "3 stages by score, trajectory": {"stages": 3, "allocation": "score", "max_sparsity": 0.95},
    "3 stages by score, trajectory, uniform weights": {
        "stages": 3, "allocation": "score", "trajectory": replace(ALONG, weights="uniform"),
    },
}  # fmt: skip
#: How the student is calibrated.
STUDENT_INPUTS = {
    "own 4 steps": {"steps": 4},
    "own 4 steps, uniform weights": {"steps": 4, "trajectory": replace(ALONG, weights="uniform")},
    "50-step trajectory": {"steps": 50},
    "noised over all timesteps": {"steps": 4, **NOISED},
}


class ObsStudy(Study):
    """Prune by OBS-Diff's settings, and judge."""

    def __init__(self, images: int, student: bool = False) -> None:
        super().__init__()
        self.images, self.steps = images, STEPS if student else 50
        self.load = load_student if student else lambda: load_pipeline("digits")
        self.pipe = self.load()

    def sampled(self, pipe, seed: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            labels = balanced_labels(self.images, 10)
            return sample_images(
                pipe, labels, guidance_scale=1.0, seed=seed, batch_size=256, steps=self.steps
            )[0]

    def measure(self, part: str, variant: str, config: PruneConfig) -> None:
        """Prune once, sample, and write a row."""
        pipe = self.load()
        started = time.perf_counter()
        report = prune(pipe, config, calibration=self.data).report
        seconds = time.perf_counter() - started
        row = {
            "part": part, "variant": variant, "granularity": config.granularity,
            "sparsity": config.budget.value, "criterion": config.criterion,
            "seed": config.seed, "images": self.images,
            **self.judged(self.sampled(pipe, config.seed), config.seed),
            "reached": report.sparsity, "prune_seconds": seconds,
            "accumulator_bytes": report.packages.accumulator_bytes if report.packages else "",
        }  # fmt: skip
        upsert_row(FILE, KEY, row | provenance())

    def dense_pictures(self, seed: int) -> torch.Tensor:
        key = (self.images, seed)
        if key not in self.dense:
            self.dense[key] = self.sampled(self.pipe, seed)
        return self.dense[key]

    def judged(self, pictures: torch.Tensor, seed: int) -> dict:
        labels = torch.tensor(balanced_labels(self.images, 10))
        error = float((pictures - self.dense_pictures(seed)).double().square().mean())
        return self.judge.score(pictures, labels) | {"mse_to_dense": error}

    def write_dense(self, part: str, seed: int) -> None:
        """Write the dense model's row."""
        scores = self.judged(self.dense_pictures(seed), seed)
        row = {
            "part": part, "variant": "dense", "granularity": "", "sparsity": 0.0,
            "criterion": "dense", "seed": seed, "images": self.images,
        }  # fmt: skip
        upsert_row(FILE, KEY, row | scores | provenance())


def table_of(seed: int) -> list[tuple[str, PruneConfig]]:
    """List every criterion at every granularity."""
    rows = []
    for granularity in ("structured", "unstructured", *PATTERNS):
        criteria = ("obs", "wanda", "magnitude")
        if granularity != "structured":
            criteria += ("dsnot",)
        sparsities = (None,) if granularity in PATTERNS else SPARSITIES
        for criterion in criteria:
            for sparsity in sparsities:
                rows.append(
                    replace(
                        BASE, granularity=granularity, criterion=criterion, sparsity=sparsity,
                        compensation="plain" if criterion == "obs" else "none", seed=seed,
                    )
                )  # fmt: skip
    return [("log_decrease", config) for config in rows]


def variants_of(part: str, seed: int) -> list[tuple[str, PruneConfig]]:
    """List what a part measures."""
    if part == "table":
        return table_of(seed)
    kinds = [("structured", 0.3), ("structured", 0.5), ("unstructured", 0.6)]
    if part == "packages":
        changes = {
            f"P = {count}": {"packages": count, "memory": "64GiB"} for count in (1, 2, 4)
        }  # fmt: skip
    else:
        changes = INPUTS if part == "inputs" else STUDENT_INPUTS
    return [
        (name, replace(BASE, granularity=granularity, sparsity=sparsity, seed=seed, **fields))
        for granularity, sparsity in kinds
        for name, fields in changes.items()
    ]


def measure_memory() -> None:
    """Prune a DiT-B/4 of random weights in packages, each in a process of its own."""
    for count in (1, 2, 4):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            row = pool.submit(_memory_of, count).result()
        key = {"part": "memory", "variant": f"P = {count}", "granularity": "structured",
               "sparsity": 0.3, "criterion": "obs", "images": 0, "seed": 0}  # fmt: skip
        upsert_row(FILE, KEY, key | row | provenance())


def _memory_of(count: int) -> dict:
    torch.manual_seed(0)
    denoiser = DiTTransformer2DModel(
        num_attention_heads=12, attention_head_dim=64, in_channels=4, out_channels=4,
        num_layers=12, sample_size=32, patch_size=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    data = [(torch.randn(64, 4, 32, 32), {"class_labels": torch.randint(0, 10, (64,))})]
    scheduler = DDIMScheduler(beta_schedule="linear", beta_end=0.02, clip_sample=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = PruneConfig(
        sparsity=0.3, stages=1, allocation="uniform", samples=64, batch_size=16, packages=count,
        memory="64GiB",
    )  # fmt: skip
    started = time.perf_counter()
    report = prune(denoiser, config, scheduler=scheduler, calibration=data).report
    return {
        "prune_seconds": time.perf_counter() - started,
        "accumulator_bytes": report.packages.accumulator_bytes,
        "expected_bytes": report.packages.expected_bytes,
        "peak_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("table", "inputs", "packages", "memory", "student"))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--missing", action="store_true", help="only rows that are not there yet")
    args = parser.parse_args()
    if args.part == "memory":
        measure_memory()
        return
    study = ObsStudy(args.images, student=args.part == "student")
    with Progress() as progress:
        jobs = [row for seed in args.seeds for row in variants_of(args.part, seed)]
        if args.missing:
            there = {tuple(row[name] for name in KEY) for row in read_rows(FILE)}
            jobs = [job for job in jobs if _key(args, *job) not in there]
        task = progress.add_task(args.part, total=len(jobs))
        for seed in args.seeds:
            study.write_dense(args.part, seed)
        for variant, config in jobs:
            label = f"{variant} {config.granularity} {config.criterion} {config.budget.value:.0%}"
            progress.update(task, description=f"{label} seed {config.seed}")
            study.measure(args.part, variant, config)
            progress.advance(task)


def _key(args: argparse.Namespace, variant: str, config: PruneConfig) -> tuple[str, ...]:
    values = (
        args.part, variant, config.granularity, f"{config.budget.value:.6g}", config.criterion,
        args.images, config.seed,
    )  # fmt: skip
    return tuple(map(str, values))


if __name__ == "__main__":
    main()
