"""Flow matching on `digits` retrained: is E[MSE] as predicted, and do its stages pay?

    python -m benchmarks.bench_flow curves     # predicted and measured errors by sigma
    python -m benchmarks.bench_flow rules      # what the score is taken by, and its M and lambda
    python -m benchmarks.bench_flow quality    # 30% in the usual stages, in equal ones, in one

Rows go to `benchmarks/results/flow.csv`. `rules` measures the final latents of 32 samples (squared
error to the dense model's over their energy) after 30% by `optimal` at 25 steps, from 128
calibration samples a stage: enough to tell rules apart, not to be quoted. Pictures are sampled
under bf16 autocast with 50 steps of DPM-Solver++, from the same noise.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch
from rich.progress import Progress

from benchmarks.flow_model import load_flow_model
from benchmarks.rows import RESULTS, provenance, upsert_row
from mosaicdiff import PruneConfig, prune
from mosaicdiff.allocation.budget import Budget
from mosaicdiff.allocation.decide import make_allocator, measured_error
from mosaicdiff.evaluate import DigitsJudge, sample_images
from mosaicdiff.evaluate.sampling import balanced_labels
from mosaicdiff.inputs.load import load_calibration
from mosaicdiff.request import prepare
from mosaicdiff.sources import load_pipeline
from mosaicdiff.statistics.gather import gather, make_probe
from mosaicdiff.trajectory.schedule import NoiseSchedule
from mosaicdiff.trajectory.stages import divide

FILE = RESULTS / "flow.csv"
KEY = ("part", "sigma", "rule", "threshold", "snr_weight", "shift", "stages", "allocation",
       "images", "seed")  # fmt: skip
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.86, 0.9, 0.95, 0.98, 1.0)
#: E[Grad] by what, M and lambda; the last is one network.
RULES = (
    ("timestep", 0.55, 0.01), ("timestep", 0.55, 0.03), ("log_snr", 0.55, 0.0),
    ("log_snr", 0.55, 0.03), ("log_snr", 0.55, 0.05), ("log_snr", 0.7, 0.05),
    ("log_snr", 0.55, 0.07), ("equal", 0.0, 0.0), ("one network", 0.0, 0.0),
)  # fmt: skip


def write(part: str, **values) -> None:
    blank = dict.fromkeys(KEY, "")
    upsert_row(FILE, KEY, blank | {"part": part} | values | provenance())


@torch.no_grad()
def curves(progress: Progress, samples: int = 512) -> None:
    """Write, at every sigma, E[MSE] predicted and measured, and the model's own errors."""
    pipe = load_flow_model()
    data = load_calibration(None, load_pipeline("digits"))
    latents = torch.cat([rows for rows, _ in data])
    labels = torch.cat([inputs["class_labels"] for _, inputs in data])
    power = float(latents.double().square().mean())
    generator = torch.Generator().manual_seed(0)
    task = progress.add_task("curves", total=len(SIGMAS))
    for sigma in SIGMAS:
        pick = torch.randperm(len(latents), generator=generator)[:samples]
        clean = latents[pick]
        noise = torch.randn(clean.shape, generator=generator)
        noisy = (1 - sigma) * clean + sigma * noise
        times = torch.full((samples,), 1000 * sigma)
        flow = pipe.transformer(noisy, timestep=times, class_labels=labels[pick]).sample
        error = float((flow - (noise - clean)).double().square().mean())
        write(
            "curves", sigma=sigma, seed=0, power=power,
            predicted_mse=sigma**2 * (power + 1),
            measured_mse=float((noisy - clean).double().square().mean()),
            flow_error=error, clean_error=sigma**2 * error,
            gain_by_log_snr=sigma**2 * (1 - sigma) * (power + 1),
        )  # fmt: skip
        progress.advance(task)


def configure(rule: str, threshold: float, snr_weight: float, shift: float) -> PruneConfig:
    """Return the request with the stages that a rule makes of the schedule."""
    config = PruneConfig(
        sparsity=0.3, allocation="optimal", steps=25, samples=128, probe_samples=32
    )
    if rule == "one network":
        return replace(config, stages=1)
    schedule = NoiseSchedule.from_scheduler(load_flow_model(shift=shift).scheduler)
    if rule == "equal":  # in sigma
        starts = np.searchsorted(schedule.noise, [1 / 3, 2 / 3]).tolist()
        return replace(config, boundaries=tuple(starts))
    scored = replace(schedule, flow=rule == "log_snr")
    division = divide(scored, threshold=threshold, snr_weight=snr_weight)
    starts = [stage.first for stage in division.stages if stage.first > 0]
    return replace(config, boundaries=tuple(starts)) if starts else replace(config, stages=1)


def rules(progress: Progress) -> None:
    """Write what the final latents lose by the stages of each rule."""
    data = load_calibration(None, load_pipeline("digits"))
    task = progress.add_task("rules", total=2 * len(RULES))
    for shift in (1.0, 3.0):
        for rule, threshold, snr_weight in RULES:
            config = configure(rule, threshold, snr_weight, shift)
            job = prepare(load_flow_model(shift=shift), config, None, data)
            allocator, fitter = make_allocator(job, gather(job, _silent), _silent)
            plan = allocator.meet(Budget("sparsity", 0.3), "optimal")
            error = measured_error(make_probe(job, "the benchmark"), fitter, plan)
            cuts = [1 / (1 + np.exp(b / 2)) for b in plan.division.boundaries]
            write(
                "rules", rule=rule, threshold=threshold, snr_weight=snr_weight, shift=shift, seed=0,
                stages=len(plan.steps), allocation="optimal", measured_error=error,
                cuts=" ".join(f"{cut:.3f}" for cut in cuts),
                steps=" ".join(str(count) for count in plan.steps),
                shares=" ".join(f"{plan.stage_sparsity(k):.3f}" for k in range(len(plan.steps))),
            )  # fmt: skip
            progress.advance(task)


def quality(progress: Progress, images: int, seed: int) -> None:
    """Write Frechet distance and accuracy of the dense model and of 30% in several stages."""
    judge, labels = DigitsJudge(), balanced_labels(images, 10)
    data = load_calibration(None, load_pipeline("digits"))

    def sample(pipe) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return sample_images(pipe, labels, seed=seed, batch_size=250)[0]

    variants = [
        (rule, allocation)
        for allocation in ("optimal", "score")
        for rule in ("usual", "equal", "one network")
    ]
    task = progress.add_task("quality", total=len(variants) + 1)
    dense = sample(load_flow_model())
    common = {"images": images, "seed": seed, "shift": 1.0}
    write("quality", rule="dense", **common, **judge.score(dense, torch.tensor(labels)))
    progress.advance(task)
    for rule, allocation in variants:
        pipe = load_flow_model()
        config = PruneConfig(sparsity=0.3, allocation=allocation, seed=seed)
        if rule == "equal":
            config = replace(config, boundaries=configure("equal", 0, 0, 1.0).boundaries)
        elif rule == "one network":
            config = replace(config, stages=1)
        report = prune(pipe, config, calibration=data).report
        pictures = sample(pipe)
        write(
            "quality", rule=rule, allocation=allocation, stages=len(report.stages), **common,
            **judge.score(pictures, torch.tensor(labels)),
            mse_to_dense=float((pictures - dense).double().square().mean()),
            shares=" ".join(f"{stage.sparsity:.3f}" for stage in report.stages),
            steps=" ".join(str(stage.steps) for stage in report.stages),
        )  # fmt: skip
        progress.advance(task)


def _silent(what: str, done: int, total: int) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("curves", "rules", "quality"))
    parser.add_argument("--images", type=int, default=512, help="of quality (512)")
    parser.add_argument("--seed", type=int, default=0, help="of quality (0)")
    args = parser.parse_args()
    with Progress() as progress:
        if args.part == "curves":
            curves(progress)
        elif args.part == "rules":
            rules(progress)
        else:
            quality(progress, args.images, args.seed)


if __name__ == "__main__":
    main()
