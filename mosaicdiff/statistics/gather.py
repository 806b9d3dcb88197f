"""Calibrate a request: statistics of every reader in every stage, and the curves from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..config import PruneConfig
from ..groups import input_widths
from ..request import Job
from ..solving.curves import RemovalCurve
from ..solving.solve import LayerProblem, Reader, trace_along, trace_layers
from ..trajectory.probe import Probe
from ..trajectory.stages import Division
from .bank import Statistics
from .calibration import Calibration
from .calibration_file import TRACED_WITH
from .capture import evaluating
from .collect import Progress, collect
from .depth import measure_changes
from .noising import CalibrationSet
from .sensitivity import GAIN_SAMPLES, measure_weights, stage_gains


def gather(job: Job, tell: Progress) -> Calibration:
    """Run the dense denoiser as the request says, and measure all that its allocation needs."""
    statistics = collect(job, job.denoiser, input_widths(job.layers), tell)
    measured = Calibration(
        division=job.frame.division,
        steps=job.frame.steps,
        layers=job.layers,
        power=job.frame.power,
        statistics=statistics,
        weighted=job.config.activations == "trajectory",
    )
    return with_extras(job, measured)


def clean_data(job: Job, purpose: str) -> CalibrationSet:
    """Return clean latents: those given, or those that the request's pipeline draws.

    Raises:
        ValueError: there are none, and nothing to draw them with.
    """
    if job.data is None and job.prompts is not None and not job.sampled.batches:
        collect(job, job.denoiser, {}, lambda what, done, total: None)
    return job.require_data(purpose)


def make_probe(job: Job, purpose: str, samples: int | None = None) -> Probe:
    """Set up the noises that measured errors are taken over.

    Args:
        purpose: what needs them, for a message.
        samples: how many; those of the configuration by default.
    """
    config = job.config
    return Probe(
        job.denoiser, job.adapter, job.scheduler, clean_data(job, purpose), steps=config.steps,
        samples=config.probe_samples if samples is None else samples, seed=config.seed,
        sampling=job.sampling, span=job.frame.span, partner=job.partner,
    )  # fmt: skip


def with_extras(job: Job, measured: Calibration) -> Calibration:
    """Add what only some allocations need: sensitivities, and what dropping blocks changes.

    They take clean latents; where none were given, those that the pipeline drew, whose
    conditions, null or not, are those it ran with.
    """
    config, frame = job.config, job.frame
    weighs = weighting_of(config) != "raw"
    ranks = config.granularity != "structured" and config.depth_rank != "curve"
    if not weighs and not ranks:
        return measured
    drawn = config if job.data is not None else replace(config, null_share=0.0)
    arguments = (
        job.denoiser, job.adapter, job.layers, frame.division.stages, frame.schedule,
        clean_data(job, "weights of errors"), drawn,
    )  # fmt: skip
    with evaluating(job.denoiser):  # in training a denoiser may drop labels at random
        if weighs:
            measured = replace(measured, weights=_weights(job, arguments))
        if ranks:
            measured = replace(measured, changes=measure_changes(*arguments))
    return measured


def weighting_of(config: PruneConfig) -> str:
    """Return the weighting that a request uses: shares use none."""
    return config.weighting if config.allocation in ("optimal", "evolutionary") else "raw"


def _weights(job: Job, arguments: tuple) -> dict[str, list[dict[str, float]]]:
    weights = measure_weights(*arguments)
    if job.config.weighting == "sensitivity":
        return {"sensitivity": weights}
    probe = make_probe(job, "weights", min(GAIN_SAMPLES, job.config.probe_samples))
    gains = stage_gains(probe, job.denoiser, job.frame.steps)
    scaled = [
        {name: gain * weight for name, weight in row.items()}
        for gain, row in zip(gains, weights, strict=True)
    ]
    return {"sensitivity": weights, "trajectory": scaled}


def weights_of(job: Job, measured: Calibration) -> Sequence[Mapping[str, float]] | None:
    """Return how much the layers' errors count for a request; None where all count alike.

    Raises:
        ValueError: the calibration was made without.
    """
    kind = weighting_of(job.config)
    if kind == "raw":
        return None
    if kind not in measured.weights:
        raise ValueError(
            f"calibration: weighting {kind} was not measured in it "
            f"(raw{''.join(f', {name}' for name in sorted(measured.weights))} can be had). "
            f"Calibrate again with --weighting {kind}, or choose another."
        )
    return measured.weights[kind]


def fit_to_frame(
    measured: Calibration, division: Division, bin_steps: Sequence[int]
) -> Calibration:
    """Join the bins of a calibration into the stages of a division.

    Args:
        bin_steps: sampling steps of each bin under the plan at hand.

    Raises:
        ValueError: a boundary of the division is not one between bins.
    """
    edges = [stage.first for stage in measured.division.stages]
    wanted = [stage.first for stage in division.stages]
    if not set(wanted) <= set(edges):
        had = ",".join(str(edge) for edge in sorted(edges)[1:])
        missing = ",".join(str(edge) for edge in sorted(set(wanted) - set(edges)))
        raise ValueError(
            f"calibration: stages must be parted at timesteps where it was ({had or 'none'}), "
            f"but {missing} is asked for. Use --stages with some of those, --stages auto, or "
            "calibrate again."
        )
    groups = [
        [k for k, edge in enumerate(edges) if stage.first <= edge <= stage.last]
        for stage in division.stages
    ]
    return replace(measured, steps=tuple(bin_steps)).merged(groups, division)


def problem_of(job: Job, measured: Calibration, stage: int, index: int) -> LayerProblem:
    """Set up one layer of one stage, its statistics on the denoiser's device."""
    packed = measured.statistics[stage]
    return _problem(job, index, lambda reader, device: packed[reader].unpack(device))


def _problem(
    job: Job, index: int, statistics: Callable[[str, torch.device], Statistics]
) -> LayerProblem:
    readers = []
    for columns in job.layers[index].readers:
        linear = job.denoiser.get_submodule(columns.module)
        bias = None if linear.bias is None else linear.bias.detach().to(job.device)
        weight = columns.of_weight(linear.weight.detach()).to(job.device)
        readers.append(Reader(weight, bias, statistics(columns.name, weight.device).in_float32()))
    return LayerProblem(job.layers[index], tuple(readers))


def traced_settings(config: PruneConfig) -> dict[str, object]:
    """Return the settings that curves depend on."""
    return {name: getattr(config, name) for name in TRACED_WITH}


def trace(job: Job, measured: Calibration, tell: Progress) -> Calibration:
    """Add to a calibration the removal curve of every layer of every stage, where it has none."""
    config = job.config
    if measured.curves is not None and measured.traced_with == traced_settings(config):
        return measured
    generator = torch.Generator().manual_seed(config.seed)
    stages = range(len(measured.division))
    orders = None if config.choice == "separate" else _pooled_orders(job, measured, generator)
    curves: list[dict[str, RemovalCurve]] = []
    for k in stages:
        tell(f"trace {measured.division.stages[k].name}", k, len(stages))
        curves.append(_trace_stage(job, measured, k, orders, generator))
    tell("trace", len(stages), len(stages))
    return replace(measured, curves=curves, traced_with=traced_settings(config))


def _trace_stage(
    job: Job,
    measured: Calibration,
    stage: int,
    orders: Mapping[str, RemovalCurve] | None,
    generator: torch.Generator,
) -> dict[str, RemovalCurve]:
    config = job.config
    indices = range(len(job.layers))
    if orders is None:
        problems = [problem_of(job, measured, stage, i) for i in indices]
        traced = trace_layers(
            problems, config.criterion, config.compensation, config.damping, generator
        )
    else:
        traced = [
            trace_along(
                problem_of(job, measured, stage, i),
                orders[job.layers[i].name].order,
                config.compensation,
                orders[job.layers[i].name].damping,
            )
            for i in indices
        ]
    return {layer.name: curve for layer, curve in zip(job.layers, traced, strict=True)}


def _pooled_orders(
    job: Job, measured: Calibration, generator: torch.Generator
) -> dict[str, RemovalCurve]:
    """Order the groups of every layer once for all stages, by H of the whole trajectory."""
    problems = [_problem(job, index, measured.pooled) for index in range(len(job.layers))]
    config = job.config
    traced = trace_layers(
        problems, config.criterion, config.compensation, config.damping, generator
    )
    return {layer.name: curve for layer, curve in zip(job.layers, traced, strict=True)}
