"""Figures and picture grids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..adapters import adapter_for
from ..groups import Denoiser
from ..statistics.noising import add_noise
from ..trajectory.schedule import NoiseSchedule
from ..trajectory.stages import Division

if TYPE_CHECKING:
    from ..sweeping import FrontPoint

_COLOURS = ("#4C72B0", "#DD8452", "#55A868", "#8172B3")
_FORMATS = {".png", ".svg", ".pdf", ".jpg"}


def check_plot_file(path: Path, option: str = "--plot") -> None:
    """Refuse a file that could not be drawn, given by an option.

    Raises:
        ValueError: its ending is unknown, or its folder is missing.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"{option} must end in {', '.join(sorted(_FORMATS))}, got {path}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} must lie in a folder that exists, got {path}.")


def measured_mse(
    schedule: NoiseSchedule, latents: torch.Tensor, points: int = 40, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Noise real latents and return (timesteps, mean of (x_t - x_0)^2) at some timesteps."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = np.linspace(0, len(schedule) - 1, points).round().astype(int)
    errors = []
    for t in timesteps:
        noise = torch.randn(latents.shape, generator=generator)
        noisy = add_noise(schedule, latents, noise, torch.full((len(latents),), int(t)))
        errors.append(float((noisy - latents).double().square().mean()))
    return timesteps, np.asarray(errors)


def trajectory_mse(
    denoiser: Denoiser, scheduler: Any, samples: int = 60, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Sample and return (timesteps, mean of (x_t - final x)^2), the measurement of MosaicDiff.

    Args:
        scheduler: deterministic and after `set_timesteps`; classes 0..9 in turn, no guidance.
    """
    adapter = adapter_for(denoiser)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(samples, *adapter.latent_shape(denoiser), generator=generator)
    labels = torch.arange(samples) % 10
    visited = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            visited.append(latents)
            noise = denoiser(latents, timestep=t.expand(samples), class_labels=labels).sample
            latents = scheduler.step(noise, t, latents).prev_sample
    errors = [float((x - latents).double().square().mean()) for x in visited]
    return np.asarray(scheduler.timesteps), np.asarray(errors)


def draw_stages(
    path: Path,
    schedule: NoiseSchedule,
    division: Division,
    power: float,
    threshold: float,
    snr_weight: float,
    measured: dict[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    """Draw MSE, gradient, SNR term, score, threshold and stages over the train timesteps."""
    from matplotlib.figure import Figure

    t = np.arange(1, len(schedule) + 1)
    score = schedule.score(power, snr_weight)
    gradient = schedule.expected_gain(power)
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(t, schedule.expected_mse(power), color="black", label="E[MSE(t)] predicted")
    for (label, points), mark in zip(measured.items(), ("o", "x"), strict=False):
        top.plot(points[0] + 1, points[1], mark, ms=4, label=f"measured, {label}")
    top.set_ylabel("MSE of x_t to x_0")
    bottom.plot(
        t,
        gradient / gradient.max(),
        color="#937860",
        label=f"E[Grad]{' by ln SNR' if schedule.flow else ''} / max",
    )
    if snr_weight > 0:
        bottom.plot(t, snr_weight * schedule.log_snr, color="#64B5CD", label="lambda ln SNR")
    bottom.plot(t, score, color="black", label="score")
    bottom.axhline(threshold * score.max(), color="grey", ls="--", label="M max score")
    bottom.set_ylabel("score")
    bottom.set_xlabel("train timestep t (1 = cleanest)")
    for axis in (top, bottom):
        for index, stage in enumerate(division.stages):
            axis.axvspan(
                stage.first + 1,
                stage.last + 1,
                alpha=0.15,
                lw=0,
                color=_COLOURS[index % len(_COLOURS)],
                label=f"{stage.name} {stage.first + 1}..{stage.last + 1}" if axis is top else None,
            )
        axis.legend(fontsize=8)
    top.set_title("Stages of the trajectory: noisy on the right")
    figure.savefig(path, dpi=130)


def picture_grid(images: torch.Tensor, columns: int, scale: int = 2, gap: int = 0) -> np.ndarray:
    """Tile images (N, C, H, W) in [-1, 1] into one uint8 array (H', W', C).

    Args:
        scale: every pixel becomes this many in both directions.
        gap: grey pixels on every side of a tile, so that bright pictures do not run together.
    """
    tiles = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    tiles = tiles.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    tiles = torch.nn.functional.pad(tiles, (gap,) * 4, value=96)
    count, channels, height, width = tiles.shape
    rows = -(-count // columns)
    sheet = torch.zeros(rows * columns, channels, height, width, dtype=torch.uint8)
    sheet[:count] = tiles
    sheet = sheet.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return sheet.reshape(rows * height, columns * width, channels).numpy()


def write_comparison_grid(
    path: Path, images: dict[str, torch.Tensor], titles: dict[str, str], columns: int = 10
) -> None:
    """Draw grids of pictures side by side, one for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(images), 5.4), layout="constrained")
    axes = figure.subplots(1, len(images), squeeze=False)[0]
    for axis, (name, sheet) in zip(axes, images.items(), strict=True):
        grid = picture_grid(sheet[: columns * columns], columns, gap=2)
        axis.imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(titles[name], fontsize=10)
        axis.axis("off")
    figure.savefig(path, dpi=110)


def draw_front(path: Path, points: Sequence[FrontPoint]) -> None:
    """Draw error against MACs, one line an allocation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    measured = points[0].measured_error is not None
    for name in dict.fromkeys(point.allocation for point in points):
        rows = sorted((p for p in points if p.allocation == name), key=lambda p: p.macs)
        errors = [p.predicted_error if p.measured_error is None else p.measured_error for p in rows]
        axis.plot([100 / p.macs_ratio for p in rows], errors, "o-", label=name)
    axis.set_yscale("log")
    axis.set_xlabel("MACs an image, % of the dense model's")
    axis.set_ylabel(
        "squared error of final latents / energy" if measured else "predicted error (of layers)"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)
