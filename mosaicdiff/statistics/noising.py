"""SNR-aware calibration: clean latents, noised within a stage, through the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter
from ..batch_errors import in_batch
from ..config import PruneConfig
from ..distributed import World
from ..trajectory.schedule import NoiseSchedule
from ..trajectory.stages import Stage
from .bank import HessianBank
from .capture import capture_inputs

#: Clean latents (B, C, H, W) and the denoiser's other inputs, each with B rows.
Batch = tuple[torch.Tensor, dict[str, Any]]


class CalibrationSet:
    """Clean latents with their conditions, checked before any work starts.

    Args:
        batches: latents (B, C, H, W) and a dict of the denoiser's other forward arguments.
        adapter: of the denoiser.
        denoiser: that the batches are meant for.
        drawn: whether the denoiser's own pipeline drew them: then they may be of any size that it
            was asked for.

    Raises:
        ValueError: there is nothing, or something that is not finite, or of a wrong shape.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        adapter: Adapter,
        denoiser: nn.Module,
        *,
        drawn: bool = False,
    ) -> None:
        latents, inputs = [], []
        for index, (latent, extra) in enumerate(batches):
            if not drawn:
                _check_size(latent, adapter.latent_shape(denoiser), adapter.any_size)
            adapter.check_inputs(denoiser, latent, extra)
            if not torch.isfinite(latent).all():
                raise ValueError(
                    f"calibration: latents must be finite, got NaN or infinity in batch {index}."
                )
            latents.append(latent.detach().float().cpu())
            inputs.append({key: value.cpu() for key, value in extra.items()})
        if sum(len(latent) for latent in latents) == 0:
            raise ValueError(
                "calibration: batches must hold at least one sample, got none. "
                "Give clean latents with their conditions."
            )
        shapes = {tuple((k, v.shape[1:]) for k, v in sorted(row.items())) for row in inputs}
        if len(shapes) > 1:
            raise ValueError(
                "calibration: inputs of all batches must have the same names and shapes, got "
                f"{' and '.join(str(dict(shape)) for shape in sorted(shapes)[:2])}. Pad them alike."
            )
        self.latents = torch.cat(latents)
        self.inputs = {key: torch.cat([row[key] for row in inputs]) for key in inputs[0]}

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def power(self) -> float:
        """P, the mean square of the clean latents."""
        return float(self.latents.double().square().mean())

    def draw(self, samples: int, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield batches of samples in random order, each used once before any is used again."""
        order: list[int] = []
        while len(order) < samples:
            order += torch.randperm(len(self), generator=generator).tolist()
        for start in range(0, samples, size):
            rows = torch.tensor(order[start : min(start + size, samples)])
            yield self.latents[rows], {key: value[rows] for key, value in self.inputs.items()}


def _check_size(latents: torch.Tensor, native: tuple[int, ...], any_size: bool) -> None:
    """Refuse latents that are not (B, *native); packed ones, (tokens, channels), have two sizes."""
    expected: list[int | str] = list(native)
    if any_size:
        names = ["tokens"] if len(native) == 2 else ["frames", "height", "width"][4 - len(native) :]
        expected = [*names, native[-1]] if len(native) == 2 else [native[0], *names]
    fits = len(latents.shape) == len(expected) + 1 and all(
        isinstance(want, str) or want == got
        for want, got in zip(expected, latents.shape[1:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"calibration: latents must be (B, {', '.join(map(str, expected))}), "
            f"got {tuple(latents.shape)}. They are VAE latents times its scaling factor."
        )


def add_noise(
    schedule: NoiseSchedule, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Return x_t = signal_t x_0 + noise_t eps for (B,) train timesteps; all on the CPU."""
    shape = (-1, *[1] * (latents.ndim - 1))
    signal = torch.from_numpy(schedule.signal)[timesteps].float().reshape(shape)
    sigma = torch.from_numpy(schedule.noise)[timesteps].float().reshape(shape)
    return signal * latents + sigma * noise


def collect_statistics(
    denoiser: nn.Module,
    adapter: Adapter,
    widths: Mapping[str, int],
    stage: Stage,
    schedule: NoiseSchedule,
    data: CalibrationSet,
    config: PruneConfig,
    advance: Callable[[int], None] = lambda samples: None,
    network: nn.Module | None = None,
) -> HessianBank:
    """Run a network on noised samples of one stage and sum the inputs of linears.

    Timesteps are uniform in the stage, noise is normal, and `config.null_share` of the samples
    carries the null condition. Draws depend on the seed and the stage only, and are made on the
    CPU, so that they are the same on every device and in every process. Several processes share
    out the batches: the sums are of this one's.

    Args:
        denoiser: the dense one, whose linears are watched.
        widths: input features of these linears, by name.
        advance: hears how many samples were run.
        network: that runs, made of the dense one's modules; the dense one itself by default.

    Raises:
        Exception: what the network raises in a batch, with the batch's number.

    Source: MosaicDiff (arXiv 2510.11962), SNR-aware calibration.
    """
    bank, world = HessianBank(widths), World.current()
    runs = denoiser if network is None else network
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + stage.first)
    batches = draw_noisy(denoiser, adapter, stage, schedule, data, config, generator)
    with torch.no_grad(), capture_inputs(denoiser, widths, bank.update):
        for index, (noisy, timesteps, inputs) in enumerate(batches):
            if world.mine(index):
                try:
                    adapter.predict(runs, noisy, timesteps, inputs)
                except Exception as error:
                    count = -(-config.samples // config.batch_size)
                    raise in_batch(error, "collect", index, count) from error
            advance(len(noisy))
    return bank


def draw_noisy(
    denoiser: nn.Module,
    adapter: Adapter,
    stage: Stage,
    schedule: NoiseSchedule,
    data: CalibrationSet,
    config: PruneConfig,
    generator: torch.Generator,
    samples: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
    """Yield noisy latents of one stage, their timesteps and conditions, on the denoiser's device.

    Train timesteps are drawn evenly; what is yielded is what a scheduler calls them.

    Args:
        generator: of all that is drawn.
        samples: how many; those of the configuration by default.
    """
    parameter = next(denoiser.parameters())
    count = config.samples if samples is None else samples
    names = torch.from_numpy(schedule.timesteps)
    names = names.float() if names.is_floating_point() else names
    for latents, inputs in data.draw(count, config.batch_size, generator):
        rows = len(latents)
        drawn = torch.randint(
            stage.first, stage.last + 1, (rows,), generator=generator, dtype=torch.long
        )
        noise = torch.randn(latents.shape, generator=generator)
        dropped = torch.rand(rows, generator=generator) < config.null_share
        inputs = adapter.null_inputs(denoiser, inputs, dropped)
        noisy = add_noise(schedule, latents, noise, drawn)
        yield (
            noisy.to(parameter.device, parameter.dtype),
            names[drawn].to(parameter.device),
            {key: value.to(parameter.device) for key, value in inputs.items()},
        )
