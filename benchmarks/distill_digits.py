"""Distil `digits` into a student of four steps, kept in `tests/fixtures`.

After progressive distillation (Salimans & Ho 2022), in one round: the teacher's DDIM trajectories
are computed once with many fine steps and kept where the student's steps end. The student starts
as the teacher and is unrolled over its own four steps, each of which should end where the
teacher's trajectory from the same noise is. No guidance. It predicts noise as the teacher does,
so the plain DDIM pipeline runs it. Only attentions and FFNs are trained, so that no more than
those has to be kept (`benchmarks.student` puts them in the teacher's place).

Everything is seeded; one CPU core takes about twelve minutes. A student that is not clearly
better than its teacher at four steps is not kept, and the exit status is 1. The fixture:

    python -m benchmarks.distill_digits
    python -m benchmarks.distill_digits --trajectories 500 --steps 50 --output short.safetensors
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.student import FIXTURE, RECORD, SPACING, STEPS, is_distilled, load_student
from benchmarks.train_digits import cosine_rate, share_embedders
from mosaicdiff import digits
from mosaicdiff.evaluate import DigitsJudge, sample_images
from mosaicdiff.evaluate.sampling import balanced_labels
from mosaicdiff.sources import load_pipeline

TEACHER_STEPS = 50  # what digits is measured with elsewhere
CHUNK = 250
WARMUP = 20
# A student is kept if its distance is below this share of the teacher's at as many steps.
CLEARLY = 0.7


def make_scheduler(pipe: DiffusionPipeline, steps: int) -> DDIMScheduler:
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=SPACING)
    scheduler.set_timesteps(steps)
    return scheduler


def trace(
    model: DiTTransformer2DModel, scheduler: DDIMScheduler, noise: torch.Tensor, labels
) -> torch.Tensor:
    """Follow the scheduler from `noise` (B, C, H, W); return all latents, (B, steps + 1, ...)."""
    latents = [noise]
    for timestep in scheduler.timesteps:
        # On a CPU the backward pass of fused attention over 16 tokens took 45% of a step.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = model(
                latents[-1], timestep=timestep.expand(len(noise)), class_labels=labels
            ).sample
        latents.append(scheduler.step(predicted.float(), timestep, latents[-1]).prev_sample)
    return torch.stack(latents, 1)


def teach(
    pipe: DiffusionPipeline, count: int, fine_steps: int, seed: int, progress: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the teacher's latents at the student's steps, (N, 5, C, H, W), and labels (N,)."""
    # Pictures are measured from the seeds upwards of 0: none of their noise is learnt from.
    generator = torch.Generator().manual_seed(-1 - seed)
    config = pipe.transformer.config
    shape = (count, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=generator)
    labels = torch.tensor(balanced_labels(count, digits.CLASSES))
    scheduler = make_scheduler(pipe, fine_steps)
    task = progress.add_task("trajectories", total=count)
    kept = []
    for start, classes in zip(noise.split(CHUNK), labels.split(CHUNK), strict=True):
        with torch.no_grad():
            latents = trace(pipe.transformer, scheduler, start, classes)
        kept.append(latents[:, :: fine_steps // STEPS].clone())
        progress.advance(task, len(start))
    return torch.cat(kept), labels


def distil(
    pipe: DiffusionPipeline, lessons: torch.Tensor, labels: torch.Tensor, args, progress: Progress
) -> float:
    """Train the pipeline's transformer in place; return the last squared error of the pictures."""
    generator = torch.Generator().manual_seed(args.seed)
    student, scheduler = pipe.transformer.train(), make_scheduler(pipe, STEPS)
    share_embedders(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(is_distilled(name))
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=args.rate, weight_decay=0.01, betas=(0.9, 0.99))
    task = progress.add_task("student", total=args.steps)
    errors: list[float] = []
    for step in range(args.steps):
        for group in optimiser.param_groups:
            group["lr"] = args.rate * cosine_rate(step, args.steps, WARMUP)
        optimiser.zero_grad(set_to_none=True)
        pick = torch.randperm(len(lessons), generator=generator)[: args.batch_size]
        target = lessons[pick]
        # Unrolled, a step learns to mend what the steps before it missed. Latents have variance
        # one all along the trajectory, so that the four errors need no weights.
        reached = trace(student, scheduler, target[:, 0], labels[pick])
        error = (reached - target)[:, 1:].square().mean((0, 2, 3, 4))
        error.sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        errors.append(float(error[-1].detach()))
        if not errors[-1] < float("inf"):
            raise RuntimeError(f"distil: the error at step {step} is {errors[-1]}.")
        recent = errors[-50:]
        progress.update(task, advance=1, description=f"student mse {sum(recent) / len(recent):.5f}")
    student.eval().requires_grad_(False)
    recent = errors[-50:]
    return sum(recent) / len(recent)


def write_student(pipe: DiffusionPipeline, file: Path, record: dict) -> None:
    """Write what was distilled in half precision, with a record of the run."""
    tensors = {
        name: parameter.detach().to(torch.float16).contiguous()
        for name, parameter in pipe.transformer.named_parameters()
        if is_distilled(name)
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={RECORD: json.dumps(record)})
    file.chmod(0o644)


def measure(file: Path, images: int, progress: Progress) -> dict[str, dict[str, float]]:
    """Judge teacher and student on the same noise, under bf16 autocast as in bench_quality."""
    teacher, labels = load_pipeline("digits"), balanced_labels(images, digits.CLASSES)
    trailing = load_pipeline("digits")
    trailing.scheduler = make_scheduler(trailing, STEPS)
    judge, scores = DigitsJudge(), {}
    runs = (
        (f"teacher_{TEACHER_STEPS}_steps", teacher, TEACHER_STEPS),
        (f"teacher_{STEPS}_steps", teacher, STEPS),
        (f"teacher_{STEPS}_steps_{SPACING}", trailing, STEPS),
        (f"student_{STEPS}_steps", load_student(file), STEPS),
    )
    task = progress.add_task("pictures", total=images * len(runs))
    for name, pipe, steps in runs:
        with torch.autocast("cpu", torch.bfloat16):
            pictures, _ = sample_images(
                pipe,
                labels,
                steps=steps,
                batch_size=CHUNK,
                advance=lambda count: progress.advance(task, count),
            )
        scores[name] = judge.score(pictures, torch.tensor(labels))
    return scores


def run(args, progress: Progress) -> dict:
    """Distil, measure what was written, and put it in `args.output` if it is good."""
    started = time.time()
    pipe = load_pipeline("digits")
    lessons, labels = teach(pipe, args.trajectories, args.fine_steps, args.seed, progress)
    error = distil(pipe, lessons, labels, args, progress)
    seconds = time.time() - started
    partial = args.output.with_name(args.output.name + ".partial")
    try:
        write_student(pipe, partial, {})
        scores = measure(partial, args.images, progress)  # of what was written
    finally:
        partial.unlink(missing_ok=True)
    record = {
        "seed": args.seed,
        "student_steps": STEPS,
        "timestep_spacing": SPACING,
        "trajectories": args.trajectories,
        "fine_steps": args.fine_steps,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "rate": args.rate,
        "mse_to_teacher": error,
        "images": args.images,
        "frechet": {name: score["frechet"] for name, score in scores.items()},
        "accuracy": {name: score["accuracy"] for name, score in scores.items()},
        "seconds": round(seconds),
        "torch": torch.__version__,
    }
    distance = record["frechet"]
    best = min(value for name, value in distance.items() if f"teacher_{STEPS}_" in name)
    reached = distance[f"student_{STEPS}_steps"]
    if not reached < CLEARLY * best:
        raise RuntimeError(
            f"distill_digits: the student's Frechet distance is {reached:.3f}, the teacher's "
            f"at as many steps {best:.3f}: not kept. Give it more --steps or --trajectories."
        )
    write_student(pipe, args.output, record)
    return record


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trajectories", type=int, default=4000, help="of the teacher (4000)")
    parser.add_argument("--fine-steps", type=int, default=48, help="of a trajectory (48)")
    parser.add_argument("--steps", type=int, default=550, help="of training (550)")
    parser.add_argument("--batch-size", type=int, default=64, help="trajectories a step (64)")
    parser.add_argument("--rate", type=float, default=3e-4, help="of learning, at its peak (3e-4)")
    parser.add_argument("--images", type=int, default=1000, help="to measure with (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (0)")
    parser.add_argument("--output", type=Path, default=FIXTURE, help="file (the fixture)")
    parser.add_argument("--json", action="store_true", help="print the record and nothing else")
    args = parser.parse_args()
    for name in ("steps", "batch_size", "images", "fine_steps"):
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
            )
    if args.fine_steps % STEPS:
        parser.error(f"--fine-steps must be a multiple of {STEPS}, got {args.fine_steps}")
    if args.trajectories < args.batch_size:
        parser.error(f"--trajectories must fill a batch of {args.batch_size}")
    if not args.rate > 0:
        parser.error(f"--rate must be above 0, got {args.rate}")
    return args


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    try:
        # Standard output is for the result.
        with Progress(console=Console(stderr=True)) as progress:
            record = run(args, progress)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if args.json:
        print(json.dumps(record))
        return
    for name, distance in record["frechet"].items():
        print(f"{name:28} Frechet {distance:.3f}  accuracy {record['accuracy'][name]:.3f}")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
