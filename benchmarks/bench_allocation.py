"""Quality of `digits` by allocation: where the budget is spent, at 20 to 60%.

    python -m benchmarks.bench_allocation table             # every allocation, three seeds
    python -m benchmarks.bench_allocation table --seeds 0 --sparsities 0.3 0.5
    python -m benchmarks.bench_allocation stages            # boundaries: closed form or data
    python -m benchmarks.bench_allocation sweep             # six budgets beside one prune

Rows go to `benchmarks/results/allocation.csv`. A seed is of calibration, of the search and of
sampling; a calibration is made once a seed and serves every budget. Pictures are sampled as in
`bench_quality`; a search sees other noises than those it is judged by.
"""

import argparse
import time
from dataclasses import replace

import torch
from rich.progress import Progress

from benchmarks.bench_quality import Study
from benchmarks.rows import RESULTS, provenance, read_rows, upsert_row
from mosaicdiff import PruneConfig, prune
from mosaicdiff.allocation.budget import Budget
from mosaicdiff.allocation.decide import make_allocator, make_probe, measured_error
from mosaicdiff.evaluate.sampling import balanced_labels
from mosaicdiff.pipeline import calibrate
from mosaicdiff.request import prepare
from mosaicdiff.search_config import SearchConfig
from mosaicdiff.sources import load_pipeline
from mosaicdiff.sweeping import sweep
from mosaicdiff.trajectory.segment import frame_of, stages_from_data

FILE = RESULTS / "allocation.csv"
KEY = ("part", "sparsity", "allocation", "images", "seed")
SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6)
#: Fields of PruneConfig for each allocation of the table.
ALLOCATIONS = {
    "score": {"allocation": "score"},
    "equal": {"allocation": "uniform"},
    "one network, optimal": {"allocation": "optimal", "stages": 1},
    "optimal": {"allocation": "optimal"},
    "optimal, raw": {"allocation": "optimal", "weighting": "raw"},
    "optimal, by sensitivity": {"allocation": "optimal", "weighting": "sensitivity"},
    "search from score": {
        "allocation": "evolutionary", "stages": 3,
        "search": {"within": "uniform", "start": ("score",)},
    },
    "search from optimal": {
        "allocation": "evolutionary", "stages": 3,
        "search": {"within": "optimal", "start": ("optimal",)},
    },
}  # fmt: skip


class AllocationStudy(Study):
    """Prune from one calibration a seed and weighting, and judge."""

    def __init__(self, images: int, search_seconds: float) -> None:
        super().__init__()
        self.images, self.search_seconds = images, search_seconds
        self.calibrations: dict[tuple, object] = {}

    def write_row(self, part: str, row: dict) -> None:
        upsert_row(FILE, KEY, {"part": part, "images": self.images} | row | provenance())

    def calibration(self, config: PruneConfig):
        key = (config.seed, config.stage_count)
        if key not in self.calibrations:
            self.calibrations = {k: v for k, v in self.calibrations.items() if k[0] == config.seed}
            whole = replace(config, allocation="optimal", weighting="trajectory")
            self.calibrations[key] = calibrate(self.pipe, whole, calibration=self.data)
        return self.calibrations[key]

    def judged(self, pictures: torch.Tensor, seed: int) -> dict:
        dense = self.dense_pictures(seed)
        labels = torch.tensor(balanced_labels(self.images, 10))
        error = float((pictures - dense).double().square().mean())
        return self.judge.score(pictures, labels) | {"mse_to_dense": error}

    def dense_pictures(self, seed: int) -> torch.Tensor:
        key = (self.images, 1.0, seed)
        if key not in self.dense:
            self.dense[key] = self.sample(self.pipe, self.images, 1.0, seed)
            labels = torch.tensor(balanced_labels(self.images, 10))
            scores = self.judge.score(self.dense[key], labels)
            row = {"sparsity": 0.0, "allocation": "dense", "seed": seed, "mse_to_dense": 0.0}
            self.write_row("table", row | scores)
        return self.dense[key]

    def measure_allocation(self, sparsity: float, name: str, seed: int) -> None:
        fields = dict(ALLOCATIONS[name])
        search = SearchConfig(**fields.pop("search", {}))
        search = replace(search, seconds=self.search_seconds, generations=10_000)
        config = PruneConfig(sparsity=sparsity, seed=seed, search=search, **fields)
        measured = self.calibration(config)
        pipe = load_pipeline("digits")
        report = prune(pipe, config, calibration=self.data, measured=measured).report
        found = report.decision.measured.get("search", {})
        self.write_row(
            "table",
            {
                "sparsity": sparsity,
                "allocation": name,
                "seed": seed,
                **self.judged(self.sample(pipe, self.images, 1.0, seed), seed),
                "reached": report.sparsity,
                "macs_ratio": report.macs_dense_with_attention / report.macs_with_attention,
                "shares": " ".join(f"{stage.sparsity:.3f}" for stage in report.stages),
                "prune_seconds": report.seconds,
                "evaluations": found.get("evaluations", ""),
                "search_start": found.get("start", ""),
                "search_best": found.get("best", ""),
            },
        )

    def measure_stages(self, seed: int) -> None:
        """Stages by the data and by the closed form, from the same bins."""
        for sparsity in SPARSITIES[1::2]:
            base = PruneConfig(
                sparsity=sparsity, seed=seed, allocation="optimal", probe_samples=128,
                max_stages=6,
            )  # fmt: skip
            job = prepare(self.pipe, replace(base, stages="auto"), None, self.data)
            given = self.calibration(replace(base, stages="auto"))
            rows = {}
            for partition in stages_from_data(job, given, lambda *row: None):
                frame, _ = frame_of(job, given, partition)
                starts = [stage.first for stage in frame.division.stages[:-1]]
                rows[f"data, {len(frame.division)} stages"] = starts
            closed = prepare(self.pipe, base, None, self.data).frame.division.stages
            rows["closed form"] = [stage.first for stage in closed[:-1]]
            for name, starts in rows.items():
                asked = replace(base, boundaries=tuple(starts)) if starts else base
                asked = asked if starts else replace(base, stages=1)
                self._measure_boundaries(name, asked, given, starts)

    def _measure_boundaries(self, name, config, given, starts) -> None:
        job = prepare(self.pipe, config, None, self.data, given)
        allocator, fitter = make_allocator(job, given, lambda *row: None)
        plan = allocator.meet(Budget("sparsity", config.budget.value))
        self.write_row(
            "stages",
            {
                "sparsity": config.budget.value,
                "allocation": name,
                "seed": config.seed,
                "boundaries": " ".join(map(str, starts)),
                "shares": " ".join(f"{plan.stage_sparsity(k):.3f}" for k in range(len(plan.steps))),
                "predicted_error": allocator.error(plan),
                "latent_error": measured_error(make_probe(job, "stages"), fitter, plan),
            },
        )

    def measure_sweep(self) -> None:
        """Time six budgets from one calibration beside one prune, in turn, three times."""
        config = PruneConfig(allocation="optimal")
        budgets = [Budget("sparsity", s) for s in (0.1, *SPARSITIES)]
        for repeat in range(3):
            started = time.perf_counter()
            prune(load_pipeline("digits"), replace(config, sparsity=0.3), calibration=self.data)
            one = time.perf_counter() - started
            pipe = load_pipeline("digits")
            started = time.perf_counter()
            sweep(pipe, budgets, config, calibration=self.data)
            six = time.perf_counter() - started
            row = {"sparsity": "", "allocation": "sweep of 6", "seed": repeat}
            self.write_row(
                "sweep", row | {"prune_seconds": one, "sweep_seconds": six, "ratio": six / one}
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("table", "stages", "sweep"))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--allocations", nargs="+", choices=tuple(ALLOCATIONS), default=None)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--search-seconds", type=float, default=60.0)
    parser.add_argument("--missing", action="store_true", help="only rows that are not there yet")
    args = parser.parse_args()
    study = AllocationStudy(args.images, args.search_seconds)
    if args.part == "sweep":
        study.measure_sweep()
        return
    with Progress() as progress:
        if args.part == "stages":
            for seed in progress.track(args.seeds, description="stages"):
                study.measure_stages(seed)
            return
        names = args.allocations or tuple(ALLOCATIONS)
        jobs = [(s, n, seed) for seed in args.seeds for n in names for s in args.sparsities]
        if args.missing:
            rows = [row for row in read_rows(FILE) if row["images"] == str(args.images)]
            there = {(row["sparsity"], row["allocation"], row["seed"]) for row in rows}
            jobs = [job for job in jobs if tuple(map(str, job)) not in there]
        task = progress.add_task("table", total=len(jobs))
        for sparsity, name, seed in jobs:
            progress.update(task, description=f"{name} {sparsity} seed {seed}")
            study.measure_allocation(sparsity, name, seed)
            progress.advance(task)


if __name__ == "__main__":
    main()
