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
from ..groups import leading_parameter
from ..inputs.rows import Rows
from ..trajectory.schedule import NoiseSchedule
from ..trajectory.stages import Stage
from .bank import HessianBank
from .capture import capture_inputs

#: Clean latents (B, ...) and the denoiser's other inputs, each with B rows.
Batch = tuple[torch.Tensor, dict[str, Any]]

#: Samples that are looked at together.
_CHECKED = 64


class CalibrationSet:
    """Clean latents with their conditions, checked before any work starts.

    What the batches hold is not copied: where it is mapped from files, it is read as it is drawn.

    Args:
        batches: latents (B, ...) and a dict of the denoiser's other forward arguments.
        adapter: of the denoiser.
        denoiser: that the batches are meant for.
        drawn: whether they are of a size that the pipeline was asked for, rather than the
            denoiser's own. Denoisers that name no size of their own take any.

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
        latents: list[torch.Tensor] = []
        inputs: list[dict[str, torch.Tensor]] = []
        fixed = not (drawn or adapter.any_size)
        squares, numbers = 0.0, 0
        for index, (latent, extra) in enumerate(batches):
            _check_size(latent, adapter.latent_shape(denoiser), fixed)
            if any(len(value) != len(latent) for value in extra.values()):
                adapter.check_inputs(denoiser, latent, extra)  # says what is wrong
            for start in range(0, max(1, len(latent)), _CHECKED):
                rows = slice(start, start + _CHECKED)
                part = latent[rows]
                adapter.check_inputs(denoiser, part, {k: v[rows] for k, v in extra.items()})
                if not torch.isfinite(part).all():
                    raise ValueError(
                        f"calibration: latents must be finite, got NaN or infinity in batch "
                        f"{index}."
                    )
                squares += float(part.double().square().sum())
                numbers += part.numel()
            latents.append(latent.detach().cpu())
            inputs.append({key: value.detach().cpu() for key, value in extra.items()})
        if numbers == 0:
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
        sizes = sorted({tuple(latent.shape[1:]) for latent in latents})
        if len(sizes) > 1:
            raise ValueError(
                f"calibration: latents of all batches must have the same size, got {sizes[0]} and "
                f"{sizes[1]}. Encode the images at one size."
            )
        self._latents = Rows(latents)
        self._inputs = {key: Rows([row[key] for row in inputs]) for key in inputs[0]}
        #: P, the mean square of the clean latents.
        self.power = squares / numbers

    def __len__(self) -> int:
        return len(self._latents)

    @property
    def latents(self) -> torch.Tensor:
        """All latents (N, ...) in float32, read into memory."""
        return self.take(torch.arange(len(self)))[0]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """All conditions, a row a sample, read into memory."""
        return self.take(torch.arange(len(self)))[1]

    def take(self, rows: torch.Tensor) -> Batch:
        """Return samples by their numbers (N,)."""
        inputs = {key: value.take(rows) for key, value in self._inputs.items()}
        return self._latents.take(rows).float(), inputs

    def chunks(self) -> Iterator[Batch]:
        """Yield all samples in order, a few at a time."""
        for rows in torch.arange(len(self)).split(_CHECKED):
            yield self.take(rows)

    def draw(self, samples: int, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield batches of samples in random order, each used once before any is used again."""
        order: list[int] = []
        while len(order) < samples:
            order += torch.randperm(len(self), generator=generator).tolist()
        for start in range(0, samples, size):
            yield self.take(torch.tensor(order[start : min(start + size, samples)]))


def _check_size(latents: torch.Tensor, expected: tuple[int, ...], fixed: bool) -> None:
    """Refuse latents that are not (B, *expected), or where any size will do, of other channels."""
    got = tuple(latents.shape[1:])
    place = 0 if len(expected) > 2 else -1  # tokens have their channels last
    alike = len(got) == len(expected) and got[place] == expected[place]
    if got != expected if fixed else not alike:
        free = "" if fixed else ", or of another size"
        raise ValueError(
            f"calibration: latents must be (B, {', '.join(map(str, expected))}){free}, "
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
                    count = -(-config.samples // config.rows_at_once)
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
    parameter = leading_parameter(denoiser)
    count = config.samples if samples is None else samples
    names = torch.from_numpy(schedule.timesteps)
    names = names.float() if names.is_floating_point() else names
    for latents, inputs in data.draw(count, config.rows_at_once, generator):
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
