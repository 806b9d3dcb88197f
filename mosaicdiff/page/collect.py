"""Read what a report shows from a pruned pipeline and its evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import PruneConfig
from ..evaluate.evaluation import Evaluation
from ..memory.count import state_memory
from ..report import PruneReport, WeightReport, report_from_dict
from ..runtime import StagedDenoiser
from ..sources import find_denoisers
from ..trajectory.schedule import NoiseSchedule
from .data import Bench, Network, Page, ScoreCurve, ShownLayer, ShownStage
from .pictures import picture_sheets

#: Points of a curve: more than a drawing has pixels would only make the file larger.
_POINTS = 240


def read_networks(pipe: Any, model: str) -> tuple[Network, ...]:
    """Describe the pruned denoisers of a pipeline.

    Args:
        pipe: with at least one staged denoiser.
        model: its name, for the message.

    Raises:
        ValueError: none of its denoisers is pruned.
    """
    staged = [part for part in find_denoisers(pipe) if isinstance(part.denoiser, StagedDenoiser)]
    if not staged:
        raise ValueError(
            f"report: model must be pruned, but {model} is dense. Prune it first: "
            f"mosaicdiff prune {model} --output FOLDER."
        )
    return tuple(read_network(part.name, part.denoiser, pipe.scheduler) for part in staged)


def make_page(
    model: str,
    networks: Sequence[Network],
    evaluation: Evaluation,
    *,
    command: str = "",
    bench: Bench | None = None,
    pictures: int = 48,
) -> Page:
    """Gather what a report of a pruned pipeline shows.

    Args:
        model: its name.
        networks: its pruned denoisers, from `read_networks`.
        evaluation: of it beside the dense pipeline.
        command: that writes this report again.
        bench: of its denoiser.
        pictures: of each model and guidance to show, at most.

    Raises:
        ValueError: no picture is asked for.
    """
    sheets = picture_sheets(evaluation, pictures)
    return Page(model, tuple(networks), evaluation, sheets, command, bench)


def read_network(component: str, staged: StagedDenoiser, scheduler: Any) -> Network:
    """Describe one staged denoiser.

    Args:
        component: its name in the pipeline.
        staged: it.
        scheduler: of the pipeline, for the score of the timesteps.
    """
    info = staged.info
    report = report_from_dict(info.report) if info.report else None
    blocks = tuple(staged.adapter.blocks(staged.stage_models[0]))
    layers = (
        _weight_layers(report, blocks)
        if report is not None and report.of_weights
        else _group_layers(staged, report, blocks)
    )
    return Network(
        component=component,
        kind=info.base_class,
        stages=tuple(_stage(staged, k, report) for k in range(len(info.division))),
        layers=layers,
        curve=_curve(staged, report, scheduler),
        memory=state_memory(staged),
        report=report,
        config=info.prune_config,
        source=info.source,
    )


def _stage(staged: StagedDenoiser, k: int, report: PruneReport | None) -> ShownStage:
    stage, steps = staged.division.stages[k], staged.info.steps[k]
    if report is None:
        return ShownStage(stage.name, stage.first + 1, stage.last + 1, steps, None, None, None)
    said = report.stages[k]
    errors = [row.error for row in said.layers] + [row.error for row in said.weights]
    return ShownStage(
        stage.name,
        stage.first + 1,
        stage.last + 1,
        steps,
        said.sparsity,
        said.macs_with_attention / report.macs_dense_with_attention,
        sum(errors) / len(errors) if errors else None,
    )


def _group_layers(
    staged: StagedDenoiser, report: PruneReport | None, blocks: Sequence[str]
) -> tuple[ShownLayer, ...]:
    shown = []
    for index, layer in enumerate(staged.info.layers):
        found = [kept.get(layer.name) for kept in staged.info.kept]
        indices = tuple(None if one is None else frozenset(one.tolist()) for one in found)
        block, part = split_name(layer.name, blocks)
        shown.append(
            ShownLayer(
                layer.name,
                block,
                part,
                layer.kind,
                layer.groups,
                tuple(layer.groups if one is None else len(one) for one in indices),
                indices,
                tuple(
                    None if report is None else report.stages[k].layers[index].error
                    for k in range(len(found))
                ),
            )
        )
    return tuple(shown)


def _weight_layers(report: PruneReport, blocks: Sequence[str]) -> tuple[ShownLayer, ...]:
    rows = [{row.name: row for row in stage.weights} for stage in report.stages]
    shapes = {name: row.shape for named in rows for name, row in named.items()}
    shown = []
    for name, (m, n) in shapes.items():
        found: list[WeightReport | None] = [named.get(name) for named in rows]
        block, part = split_name(name, blocks)
        kept = tuple(m * n if r is None else round((1 - r.removed) * m * n) for r in found)
        errors = tuple(0.0 if r is None else r.error for r in found)
        whole = (None,) * len(rows)
        shown.append(ShownLayer(name, block, part, "weights", m * n, kept, whole, errors))
    return tuple(shown)


def split_name(name: str, blocks: Sequence[str]) -> tuple[str, str]:
    """Return the block that holds a layer and the rest of its name."""
    for block in blocks:
        if name.startswith(f"{block}."):
            return block, name[len(block) + 1 :]
    block, _, part = name.rpartition(".")
    return block, part


def _curve(staged: StagedDenoiser, report: PruneReport | None, scheduler: Any) -> ScoreCurve | None:
    """Return the score by which stages are divided, as it was when they were."""
    try:
        schedule = NoiseSchedule.from_scheduler(scheduler)
    except ValueError:  # no SNR, as of a scheduler that was exchanged since: nothing to draw
        return None
    config = PruneConfig.from_dict(dict(staged.info.prune_config))
    power = None if report is None else report.latent_power
    score = schedule.score(power, config.snr_weight)
    gain = schedule.expected_gain(power)
    by_score = config.boundaries is None and config.stage_count == 3
    threshold = schedule.usual_threshold if config.threshold is None else config.threshold
    chosen = np.unique(np.linspace(0, len(schedule) - 1, _POINTS).round().astype(int))
    return ScoreCurve(
        tuple((chosen + 1).tolist()),
        tuple(score[chosen].tolist()),
        tuple((gain / gain.max())[chosen].tolist()),
        float(threshold * score.max()) if by_score else None,
        _origin(config),
    )


def _origin(config: PruneConfig) -> str:
    """Say where the boundaries of the stages come from."""
    if config.boundaries is not None:
        return "The boundaries were given."
    if config.stage_count == 3:
        return "The middle stage is the run around the peak that stays above the dashed line."
    if config.stage_count == "auto":
        return "The boundaries were found from the data, and need not follow the score."
    if config.stage_count == 1:
        return "There is one stage: the score divided nothing."
    return f"The sampling steps were divided evenly into {config.stage_count}, not by the score."
