"""`mosaicdiff stages`: divide a schedule and draw why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..trajectory.schedule import FLOW_SNR_WEIGHT, FLOW_THRESHOLD, SNR_WEIGHT, THRESHOLD
from ..trajectory.schedulers import Sampling
from .common import (
    console,
    examples,
    guarded,
    json_option,
    pipeline_config_option,
    print_json,
)

if TYPE_CHECKING:
    from ..sources import Component


@click.command(
    epilog=examples(
        "mosaicdiff stages --schedule linear --threshold 0.5 --snr-weight 0",
        "mosaicdiff stages digits --steps 50 --plot stages.png",
        "mosaicdiff stages --schedule flow --shift 3",
        "mosaicdiff stages --schedule flow --shift dynamic --tokens 4096 --steps 28",
    )
)
@click.argument("model", required=False)
@click.option(
    "--schedule", help="linear, scaled_linear, squaredcos_cap_v2 or flow, instead of MODEL."
)
@click.option(
    "--steps", default=50, show_default=True,
    help="Sampling steps (DDIM for --schedule, Euler for flow).",
)  # fmt: skip
@click.option(
    "--shift",
    default="1",
    show_default=True,
    help="Of --schedule flow: of the sampler's sigmas, or dynamic: by --tokens, as FLUX has it.",
)
@click.option("--tokens", type=int, help="Of an image, where the shift depends on the resolution.")
@click.option(
    "--threshold",
    type=float,
    help="M: where the middle begins.  "
    f"[default: {THRESHOLD:g}; {FLOW_THRESHOLD:g} with flow matching]",
)
@click.option(
    "--snr-weight",
    type=float,
    help="lambda, weight of ln SNR.  "
    f"[default: {SNR_WEIGHT:g}; {FLOW_SNR_WEIGHT:g} with flow matching]",
)
@click.option("--component", help="Of a pipeline with two denoisers: the other than the first.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the curves into this file.")
@pipeline_config_option
@json_option
@guarded
def stages(
    model: str | None,
    schedule: str | None,
    steps: int,
    shift: str,
    tokens: int | None,
    threshold: float | None,
    snr_weight: float | None,
    component: str | None,
    pipeline_config: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Divide the trajectory of MODEL, or of a named schedule, into stages.

    The score of a timestep is its normalised gain in MSE plus lambda ln SNR; the middle stage is
    the run around the maximum with a score of at least M times the largest. With flow matching
    the gain is by unit of ln SNR and not by timestep.
    """
    if (model is None) == (schedule is None):
        raise ValueError("stages: give either MODEL or --schedule, and not both.")
    from ..allocation.planning import step_scores
    from ..config import PruneConfig
    from ..trajectory.schedule import NoiseSchedule, step_log_snr
    from ..trajectory.schedulers import start_steps
    from ..trajectory.span import Span
    from ..trajectory.stages import divide, stage_means
    from .plots import check_plot_file, draw_stages

    PruneConfig(threshold=threshold, snr_weight=snr_weight, steps=steps)
    if plot is not None:
        check_plot_file(plot)
    sampling, span, latents, denoiser = Sampling(tokens), Span(), None, None
    if schedule is not None:
        noise = NoiseSchedule.named(schedule)
        scheduler = _flow(shift) if noise.flow else _ddim(noise)
    else:
        scheduler, latents, part = _read_model(str(model), component, pipeline_config)
        denoiser, span = part.denoiser, part.span
        noise = NoiseSchedule.from_scheduler(scheduler)
        sampling = _sampling_of(denoiser, tokens)
    power = noise.usual_power if latents is None else float(latents.double().square().mean())
    threshold = noise.usual_threshold if threshold is None else threshold
    snr_weight = noise.usual_snr_weight if snr_weight is None else snr_weight
    if steps > len(noise):
        raise ValueError(f"stages: --steps must be at most {len(noise)}, got {steps}.")
    start_steps(scheduler, steps, sampling)
    visited = step_log_snr(scheduler)[span.holds(scheduler.timesteps)]
    if not len(visited):
        raise ValueError(f"stages: --steps must reach the timesteps {span}, got {steps}.")
    division = divide(noise, power=power, threshold=threshold, snr_weight=snr_weight)
    counts = division.count_steps(visited)
    scores = step_scores(noise, visited, power, snr_weight)
    used = [stage for stage, count in zip(division.stages, counts, strict=True) if count]
    means = dict(
        zip(
            (stage.name for stage in used),
            stage_means(division.without_empty(noise, visited), scores, visited),
            strict=True,
        )
    )
    rows: list[dict[str, Any]] = [
        {
            "name": stage.name,
            "first": stage.first + 1,
            "last": stage.last + 1,
            "first_timestep": stage.first,
            "last_timestep": stage.last,
            "steps": count,
            "mean_score": means.get(stage.name),
            "noisiest_log_snr": float(noise.log_snr[stage.last]),
            "cleanest_log_snr": float(noise.log_snr[stage.first]),
        }
        for stage, count in zip(division.stages, counts, strict=True)
    ]
    if plot is not None:
        measured = {} if latents is None else _measure(noise, latents, denoiser, scheduler)
        draw_stages(plot, noise, division, power, threshold, snr_weight, measured)
    if as_json:
        print_json(
            {
                "stages": rows,
                "boundaries_log_snr": list(division.boundaries),
                "power": power,
                "threshold": threshold,
                "snr_weight": snr_weight,
                "steps": steps,
                "plot": None if plot is None else str(plot),
            }
        )
        return
    _print_table(rows, power, threshold, snr_weight)
    if plot is not None:
        click.echo(f"wrote {plot}")


def _ddim(noise: Any) -> Any:
    import numpy as np
    from diffusers import DDIMScheduler

    alphas = noise.signal**2
    betas = 1 - alphas / np.concatenate([[1.0], alphas[:-1]])
    return DDIMScheduler(num_train_timesteps=len(noise), trained_betas=betas.tolist())


def _flow(shift: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    if shift == "dynamic":
        return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    try:
        value = float(shift)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"--shift must be a number above 0, or dynamic, got {shift!r}.")
    return FlowMatchEulerDiscreteScheduler(shift=value)


def _sampling_of(denoiser: Any, tokens: int | None) -> Sampling:
    """Return how the pipelines of a denoiser start their sampler; not of one without adapter."""
    from ..adapters import adapter_for_class
    from ..request import sampling_of
    from ..runtime import StagedDenoiser

    staged = isinstance(denoiser, StagedDenoiser)
    name = denoiser.info.base_class if staged else type(denoiser).__name__
    known = sampling_of(adapter_for_class(name), denoiser)
    return known if tokens is None else replace(known, tokens=tokens)


def _measure(noise: Any, latents: Any, denoiser: Any, scheduler: Any) -> dict[str, Any]:
    from .plots import measured_mse, trajectory_mse

    return {
        "noised latents": measured_mse(noise, latents),
        "sampling trajectories": trajectory_mse(denoiser, scheduler),
    }


def _read_model(model: str, component: str | None, place: str | None) -> tuple[Any, Any, Component]:
    """Return a model's scheduler, its latents where it carries its own data, and its denoiser."""
    import torch

    from ..inputs.load import load_calibration
    from ..sources import DIGITS, find_component, load_pipeline

    pipe = load_pipeline(model, config=place)
    latents = None
    if model == DIGITS:
        latents = torch.cat([batch for batch, _ in load_calibration(None, pipe)])
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return scheduler, latents, find_component(pipe, component)


def _print_table(
    rows: list[dict[str, Any]], power: float, threshold: float, snr_weight: float
) -> None:
    from rich.table import Table

    table = Table(title=f"stages (M {threshold:g}, lambda {snr_weight:g}, P {power:.3g})")
    table.add_column("stage")
    for column in ("t (from 1)", "diffusers timesteps", "sampling steps", "mean score"):
        table.add_column(column, justify="right")
    for row in rows:
        score = row["mean_score"]
        table.add_row(
            row["name"],
            f"{row['first']}..{row['last']}",
            f"{row['first_timestep']}..{row['last_timestep']}",
            str(row["steps"]),
            "-" if score is None else f"{score:.3f}",
        )
    console().print(table)
