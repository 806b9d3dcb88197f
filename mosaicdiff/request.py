"""From what the user hands over to a checked request, before any work is done."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .adapters import Adapter, adapter_for
from .allocation.costs import CostModel, layer_sizes
from .allocation.planning import Frame, effort_bounds, make_frame, share_plan
from .allocation.units import with_units
from .config import PruneConfig
from .groups import Denoiser, Macs, PrunableLayer, leading_parameter
from .inputs.asked import CalibrationSource, read_asked, read_data, with_batch
from .memory.ties import repeated_parameters
from .patterns import check_patterns, is_chosen
from .runtime import StagedDenoiser
from .sources import (
    DIGITS,
    Component,
    find_component,
    find_denoisers,
    source_name,
)
from .statistics.calibration import Calibration
from .statistics.calibration_file import check_made_for, load_calibration_file, made_for
from .statistics.noising import CalibrationSet
from .statistics.prompts import (
    Prompts,
    PromptSource,
)
from .statistics.sampled import SampledLatents
from .targets import choose_targets, target_shares
from .trajectory.schedulers import Sampling, is_flow


@dataclass(frozen=True)
class Job:
    """A checked request: everything that can be refused has been looked at.

    Args:
        denoiser: the dense one.
        adapter: of the denoiser.
        scheduler: that says how noisy each timestep is.
        layers: what may be removed.
        frame: the stages, or bins where the stages come from the data.
        config: the request.
        costs: what plans cost; without latencies.
        data: clean latents with their conditions; None where a calibration was given and
            nothing needs them.
        measured: a calibration made before.
        pipeline: whose denoiser it is, and
        component: under which name.
        prompts: that the pipeline is sampled with, where its own trajectories are seen.
        sampled: what it drew then; filled by the first run of the dense denoiser.
        sampling: how the pipeline starts its sampler.
        partner: the pipeline's other denoiser, which makes the steps before this one's.
    """

    denoiser: Denoiser
    adapter: Adapter
    scheduler: Any
    layers: tuple[PrunableLayer, ...]
    frame: Frame
    config: PruneConfig
    costs: CostModel
    data: CalibrationSet | None
    measured: Calibration | None
    pipeline: DiffusionPipeline | None
    component: str | None
    prompts: Prompts | None = None
    sampled: SampledLatents = field(default_factory=SampledLatents)
    sampling: Sampling = Sampling()
    partner: Denoiser | None = None

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs; with offloading its parameters rest elsewhere."""
        if self.pipeline is not None:
            return torch.device(self.pipeline._execution_device)
        return leading_parameter(self.denoiser).device

    def require_data(self, purpose: str) -> CalibrationSet:
        """Return the clean latents: those given, or else those that the pipeline drew.

        Raises:
            ValueError: there are none; the message says what needs them.
        """
        data = self.data if self.data is not None else self.sampled.data(self)
        if data is None:
            raise ValueError(
                f"prune: calibration must be given for {purpose}, got None: the file of "
                "statistics does not hold the conditions to sample with. Name the latents too."
            )
        return data


def prepare(
    model: DiffusionPipeline | Denoiser,
    config: PruneConfig,
    scheduler: Any,
    calibration: CalibrationSource,
    measured: Calibration | str | Path | None = None,
    prompts: PromptSource = None,
    *,
    component: str | None = None,
    cache: bool = True,
) -> Job:
    """Check a request; see `pipeline.prune` for the arguments and errors.

    Args:
        component: which denoiser of a pipeline; the first that it calls by default.
        cache: whether what is encoded is kept on disk.
    """
    pipeline = model if isinstance(model, DiffusionPipeline) else None
    part = _choose_part(model, component)
    denoiser = part.denoiser
    if isinstance(denoiser, StagedDenoiser):
        raise ValueError(
            "prune: model must be dense, but it is pruned already. Prune the original instead."
        )
    adapter = adapter_for(denoiser)
    adapter.check(denoiser)
    if scheduler is None:
        scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        raise ValueError(
            "prune: scheduler must be given with a bare denoiser, got None. "
            "It says how noisy each timestep is."
        )
    _check_family(adapter, scheduler)
    sampling = sampling_of(adapter, denoiser)
    asked = read_asked(prompts, pipeline, config, calibration, measured is not None, cache)
    layers = allowed_layers(adapter, denoiser, config)
    _check_norms(adapter, denoiser, config)
    config = _with_ends(config, adapter, denoiser)
    # Refuse what no calibration could save before reading it; the power of its latents comes later.
    if config.removes_weights:
        names = [target.name for target in adapter.targets(denoiser)]
    else:
        names = [layer.name for layer in layers]
    check_patterns(names, config.include, "include")
    check_patterns(names, config.exclude, "exclude")
    _check_ways(layers, adapter, config)
    macs = adapter.macs(denoiser)  # it takes a while of a large denoiser
    unmeasured = make_frame(scheduler, config, None, sampling, part.span)
    _check_reach(layers, unmeasured, config, denoiser, adapter, macs)
    if measured is not None:
        if config.removes_weights:
            raise ValueError(
                f"prune: measured must be left out with granularity {config.granularity!r}: a kept "
                "calibration holds what groups need, not single weights."
            )
        if isinstance(measured, (str, Path)):
            measured = load_calibration_file(measured)
        check_made_for(measured, made_for(denoiser, scheduler, config, asked.sampled))
    needless = config.activations == "trajectory" or (
        measured is not None and source_name(pipeline) != DIGITS
    )
    data = None
    if calibration is not None or not needless:
        data = read_data(calibration, pipeline, adapter, denoiser, asked)
    if data is not None and measured is None and config.null_share > 0:
        # Refuse before any work where the batches do not hold what a null condition is.
        _, first = data.take(torch.zeros(1, dtype=torch.long))
        adapter.null_inputs(denoiser, first, torch.ones(1, dtype=torch.bool))
    if config.shared_norms != "exact" and data is None and asked.sampled is None:
        raise ValueError(
            f"prune: calibration must be given with shared_norms={config.shared_norms!r}, got "
            "None: what the approximation changes is measured on it. Name the latents too."
        )
    power = measured.power if measured is not None else data.power if data is not None else None
    frame = make_frame(scheduler, config, power, sampling, part.span)
    costs = _check_reach(layers, frame, config, denoiser, adapter, macs)
    config = with_batch(config, adapter, denoiser, frame, data)
    return Job(
        denoiser, adapter, scheduler, layers, frame, config, costs, data, measured, pipeline,
        part.name or None, asked.sampled, sampling=sampling, partner=_partner(pipeline, part),
    )  # fmt: skip


def allowed_layers(
    adapter: Adapter, denoiser: Denoiser, config: PruneConfig
) -> tuple[PrunableLayer, ...]:
    """Return the layers of a denoiser, with units of its device where `round_to` is `auto`.

    Raises:
        ValueError: units are asked for where nothing can be timed.
    """
    layers = adapter.layers(denoiser, config.shared_norms)
    if config.round_to != "auto":
        return layers
    return with_units(
        layers, denoiser, adapter,
        batch_size=config.latency_batch, shared_norms=config.shared_norms,
    )  # fmt: skip


def _choose_part(model: DiffusionPipeline | Denoiser, component: str | None) -> Component:
    """Return the denoiser that is asked for; a bare one has no name."""
    if isinstance(model, DiffusionPipeline):
        return find_component(model, component)
    if component is not None:
        raise ValueError(
            f"prune: component must be left out with a bare denoiser, got {component!r}. It names "
            "a denoiser of a pipeline."
        )
    return Component("", model)


def _partner(pipeline: DiffusionPipeline | None, part: Component) -> Denoiser | None:
    """Return the denoiser that a pipeline calls before another."""
    if pipeline is None or part.span.whole:
        return None
    before = [c.denoiser for c in find_denoisers(pipeline) if c.span.at_least == part.span.below]
    return before[0] if before else None


def sampling_of(adapter: Adapter, denoiser: Denoiser) -> Sampling:
    """Return how the pipelines of a family start their sampler, at the denoiser's own size."""
    tokens = adapter.tokens(denoiser)["image"]
    return Sampling(tokens, adapter.passes_sigmas, adapter.empirical_shift)


def _check_norms(adapter: Adapter, denoiser: Denoiser, config: PruneConfig) -> None:
    """Refuse an approximation of norms that are not there."""
    shared = any(writer.whole for layer in adapter.layers(denoiser) for writer in layer.writers)
    if config.shared_norms != "exact" and not shared:
        raise ValueError(
            f"prune: shared_norms must be exact, got {config.shared_norms!r}: this "
            f"{adapter.denoiser_class} has no norms over all heads together. Leave it out."
        )


def _check_family(adapter: Adapter, scheduler: Any) -> None:
    """Refuse a scheduler of another family than the denoiser can have been trained with.

    What a timestep means is the scheduler's to say. A denoiser that is given train timesteps (DiT,
    PixArt, a U-Net) may have been trained with any family: it embeds whatever number comes, so
    that 1000 sigma of a flow is as good, and nothing in its configuration tells. One whose
    pipelines are written for sigmas (FLUX divides the time by 1000) has no other family.
    """
    if adapter.sigma_scale is not None and not is_flow(scheduler):
        raise ValueError(
            f"prune: scheduler must be flow matching for {adapter.denoiser_class}, got "
            f"{type(scheduler).__name__}. Give the one the model was trained for."
        )


def _with_ends(config: PruneConfig, adapter: Adapter, denoiser: Denoiser) -> PruneConfig:
    """Exclude the first and last block where that is asked for, or usual."""
    usual = adapter.joint and not config.removes_weights
    if not (usual if config.whole_ends is None else config.whole_ends):
        return config
    blocks = adapter.blocks(denoiser)
    ends = tuple(name for name in (blocks[0], blocks[-1]) if name not in config.exclude)
    return replace(config, exclude=(*config.exclude, *ends))


def _check_ways(layers: tuple[PrunableLayer, ...], adapter: Adapter, config: PruneConfig) -> None:
    """Refuse ways of pruning that a family's structure does not allow."""
    if config.removes_weights:
        return
    if config.granularity != "structured" and config.depth_rank != "curve":
        if not adapter.watches_blocks:
            raise ValueError(
                f"prune: depth_rank must be 'curve' for {adapter.denoiser_class}, got "
                f"{config.depth_rank!r}: what its layers add to the stream is not measured."
            )
    if config.compensation == "affine":
        for layer in layers:
            packed = [reader.module for reader in layer.readers if reader.stop is not None]
            if packed and is_chosen(layer.name, config.include, config.exclude):
                raise ValueError(
                    f"prune: compensation must not be 'affine' for {layer.name}: another layer is "
                    f"read by {packed[0]} too, and both would change its one bias. Use 'plain', or "
                    f"exclude {layer.block!r}."
                )


def _check_reach(
    layers: tuple[PrunableLayer, ...],
    frame: Frame,
    config: PruneConfig,
    denoiser: Denoiser,
    adapter: Adapter,
    macs: Macs,
) -> CostModel:
    """Refuse a budget that even removing all that may go does not meet."""
    parameter = leading_parameter(denoiser)
    costs = CostModel(
        layers,
        frame.steps,
        layer_sizes(denoiser, layers),
        macs,
        sum(p.numel() for p in denoiser.parameters()),
        parameter.element_size(),
        file_overhead=file_overhead(denoiser, len(frame.steps)),
        repeated_params=repeated_parameters(denoiser, adapter.repeats),
        bias_per_stage=config.compensation == "affine",
        refitted=config.compensation != "none",
    )
    if config.removes_weights:
        target_shares(choose_targets(adapter, denoiser, config), frame, config)
    elif config.allocation == "explicit":
        share_plan(layers, frame, config, 0.0)
    else:
        effort_bounds(layers, frame, config, costs)
    return costs


def file_overhead(denoiser: Denoiser, stages: int) -> int:
    """Return about how many bytes the header of a staged weights file takes."""
    names = sum(len(name) for name, _ in denoiser.named_parameters())
    count = sum(1 for _ in denoiser.parameters())
    # Each entry says name, type, shape and place; pruned layers are there once a stage.
    return (names + 90 * count) * (1 + stages) // 2
