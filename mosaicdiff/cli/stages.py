"""`mosaicdiff stages`: divide a schedule and draw why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import (
    console,
    examples,
    guarded,
    json_option,
    pipeline_config_option,
    print_json,
)


@click.command(
    epilog=examples(
        "mosaicdiff stages --schedule linear --threshold 0.5 --snr-weight 0",
        "mosaicdiff stages digits --steps 50 --plot stages.png",
    )
)
@click.argument("model", required=False)
@click.option("--schedule", help="linear, scaled_linear or squaredcos_cap_v2, instead of MODEL.")
@click.option(
    "--steps", default=50, show_default=True, help="Sampling steps (DDIM for --schedule)."
)
@click.option("--threshold", default=0.55, show_default=True, help="M: where the middle begins.")
@click.option("--snr-weight", default=0.01, show_default=True, help="lambda, weight of ln SNR.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the curves into this file.")
@pipeline_config_option
@json_option
@guarded
def stages(
    model: str | None,
    schedule: str | None,
    steps: int,
    threshold: float,
    snr_weight: float,
    plot: Path | None,
    pipeline_config: str | None,
    as_json: bool,
) -> None:
    """Divide the trajectory of MODEL, or of a named schedule, into stages.

    The score of a timestep is its normalised gain in MSE plus lambda ln SNR; the middle stage is
    the run around the maximum with a score of at least M times the largest.
    """
    if (model is None) == (schedule is None):
        raise ValueError("stages: give either MODEL or --schedule, and not both.")
    from ..allocation.planning import step_scores
    from ..config import PruneConfig
    from ..trajectory.schedule import NoiseSchedule, step_log_snr
    from ..trajectory.stages import divide, stage_means
    from .plots import check_plot_file, draw_stages

    PruneConfig(threshold=threshold, snr_weight=snr_weight, steps=steps)
    if plot is not None:
        check_plot_file(plot)
    power, latents, denoiser = 1.0, None, None
    if schedule is not None:
        noise = NoiseSchedule.named(schedule)
        scheduler = _ddim(noise)
    else:
        scheduler, latents, denoiser = _read_model(str(model), pipeline_config)
        noise = NoiseSchedule.from_scheduler(scheduler)
        if latents is not None:
            power = float(latents.double().square().mean())
    if steps > len(noise):
        raise ValueError(f"stages: --steps must be at most {len(noise)}, got {steps}.")
    scheduler.set_timesteps(steps)
    visited = step_log_snr(scheduler)
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


def _measure(noise: Any, latents: Any, denoiser: Any, scheduler: Any) -> dict[str, Any]:
    from .plots import measured_mse, trajectory_mse

    return {
        "noised latents": measured_mse(noise, latents),
        "sampling trajectories": trajectory_mse(denoiser, scheduler),
    }


def _read_model(model: str, place: str | None) -> tuple[Any, Any, Any]:
    """Return a model's scheduler, its latents where it carries its own data, and its denoiser."""
    import torch

    from ..inputs.load import load_calibration
    from ..sources import DIGITS, find_denoiser, load_pipeline

    pipe = load_pipeline(model, config=place)
    latents = None
    if model == DIGITS:
        latents = torch.cat([batch for batch, _ in load_calibration(None, pipe)])
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return scheduler, latents, find_denoiser(pipe)[1]


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
