"""What an evaluation found: a row for each model and guidance, and all that it takes to repeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True)
class Metric:
    """What a figure of a row is.

    Args:
        name: key in `Row.metrics`.
        title: for people, e.g. `Frechet distance`.
        better: `lower` or `higher`.
        about: what it compares with: `reference` (real pictures), `dense` (the dense pictures of
            the same seeds), `condition` (what was asked for) or `itself`.
        network: whose features it is taken in; None where it is taken in pixels.
        percent: whether it is a share, to be written as a percentage.
    """

    name: str
    title: str
    better: str
    about: str
    network: str | None = None
    percent: bool = False

    def is_better(self, one: float, other: float) -> bool:
        """Return whether one value is better than another."""
        return one < other if self.better == "lower" else one > other


@dataclass(frozen=True)
class Row:
    """What was measured of one model at one guidance scale.

    Args:
        model: `dense` or `pruned`.
        guidance_scale: as the pipeline was given it; None is the pipeline's own.
        parameters: in the checkpoint of its denoisers, all stages together.
        bytes: of those.
        passes_per_image: passes of one sample through a denoiser; guidance that is computed beside
            the prediction doubles it, and samplers of higher order take more than one a step.
        macs_per_image: multiply-accumulates of products of weights, of all passes.
        macs_with_attention_per_image: those and attention's products.
        seconds_per_image: of the whole pipeline, decoding included: the median over batches.
        metrics: by name; what compares with the dense pictures is missing for `dense`.
        best_by: names of the metrics by which no other guidance of this model is better.
    """

    model: str
    guidance_scale: float | None
    parameters: int
    bytes: int
    passes_per_image: float
    macs_per_image: float
    macs_with_attention_per_image: float
    seconds_per_image: float
    metrics: Mapping[str, float]
    best_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """Dense over pruned at two guidance scales, which may be the same.

    Args:
        dense_guidance: of the dense row.
        pruned_guidance: of the pruned row.
        speedup: seconds of the dense model over those of the pruned one.
        macs: the same of MACs without attention products.
        macs_with_attention: the same with them.
        parameters: the same of parameters.
        bytes: the same of bytes.
    """

    dense_guidance: float | None
    pruned_guidance: float | None
    speedup: float
    macs: float
    macs_with_attention: float
    parameters: float
    bytes: float


@dataclass(frozen=True)
class Setting:
    """How both models were sampled and judged.

    Args:
        models: where `dense` and `pruned` came from.
        pipeline: class name.
        denoiser: class name.
        num_images: of each row.
        conditions: label or prompt of every picture, in order.
        condition_kind: `class_labels` or `prompt`.
        guidance_scales: in the order asked for.
        steps: None is the pipeline's own number.
        seed: of the noise; picture i has the same in every row.
        batch_size: pictures of a call.
        options: other arguments of the pipeline's call.
        network: of the features, or None.
        reference: what the features were compared with, or None.
        reference_images: how many pictures that is; None where only their statistics are known.
        neighbours: k of precision and recall.
        splits: parts of the Inception score.
        device: name.
        dtype: of the weights.
        threads: of the CPU.
        versions: of packages, and of Python.
        command: that repeats it, as the shell takes it; empty where it was called from Python.
    """

    models: Mapping[str, str]
    pipeline: str
    denoiser: str
    num_images: int
    conditions: tuple[int, ...] | tuple[str, ...]
    condition_kind: str
    guidance_scales: tuple[float | None, ...]
    steps: int | None
    seed: int
    batch_size: int
    options: Mapping[str, Any]
    network: str | None
    reference: str | None
    reference_images: int | None
    neighbours: int
    splits: int
    device: str
    dtype: str
    threads: int
    versions: Mapping[str, str]
    command: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Dense beside pruned.

    Args:
        rows: for each guidance in turn that of `dense`, then that of `pruned`.
        metrics: what the rows' figures are, in the order to show them.
        best_by: the metric by which `best` chooses, or None where there is none.
        setting: how they came about.
        notes: what has to be known to read the figures, a sentence each.
        images: by (model, guidance): the first pictures (N, C, H, W), or videos
            (N, F, C, H, W), in [-1, 1], float32 on the CPU: at most 100, fewer of large ones.
    """

    rows: tuple[Row, ...]
    metrics: tuple[Metric, ...]
    best_by: str | None
    setting: Setting
    notes: tuple[str, ...]
    images: Mapping[tuple[str, float | None], torch.Tensor] = field(repr=False)

    def row(self, model: str, guidance_scale: float | None) -> Row:
        """Return the row of a model at a guidance scale.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if (row.model, row.guidance_scale) == (model, guidance_scale):
                return row
        raise ValueError(
            f"Evaluation.row: model and guidance_scale must be of a row, got {model!r} at "
            f"{guidance_scale}. Sampled were {', '.join(map(str, self.setting.guidance_scales))}."
        )

    def metric(self, name: str) -> Metric:
        """Return what is known of a metric.

        Raises:
            ValueError: it was not measured.
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        names = ", ".join(metric.name for metric in self.metrics)
        raise ValueError(f"Evaluation.metric: name must be one of {names}, got {name!r}.")

    def best(self, model: str) -> Row:
        """Return the row of a model at its best guidance, by `best_by`; the first of equals.

        Where there is one guidance only, that is it.

        Raises:
            ValueError: there are several and no metric to choose by.
        """
        found = [row for row in self.rows if row.model == model]
        if len(found) > 1 and self.best_by is None:
            raise ValueError(
                "Evaluation.best: best_by must name a metric to choose among "
                f"{len(found)} guidance scales, got None. Give a feature network."
            )
        if self.best_by is None:
            return found[0]
        return next(row for row in found if self.best_by in row.best_by)

    def ratio(self, dense: Row, pruned: Row) -> Ratio:
        """Return what the dense row takes over what the pruned row takes."""
        return Ratio(
            dense_guidance=dense.guidance_scale,
            pruned_guidance=pruned.guidance_scale,
            speedup=dense.seconds_per_image / pruned.seconds_per_image,
            macs=dense.macs_per_image / pruned.macs_per_image,
            macs_with_attention=(
                dense.macs_with_attention_per_image / pruned.macs_with_attention_per_image
            ),
            parameters=dense.parameters / pruned.parameters,
            bytes=dense.bytes / pruned.bytes,
        )

    @property
    def pairs(self) -> tuple[tuple[Row, Row], ...]:
        """The dense and the pruned row of each guidance scale."""
        scales = self.setting.guidance_scales
        return tuple((self.row(DENSE, s), self.row(PRUNED, s)) for s in scales)

    @property
    def best_pair(self) -> tuple[Row, Row] | None:
        """Each model's row at its own best guidance; None where nothing chooses among several."""
        if self.best_by is None and len(self.setting.guidance_scales) > 1:
            return None
        return self.best(DENSE), self.best(PRUNED)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold, without the pictures."""
        pair = self.best_pair
        return {
            "rows": [asdict(row) for row in self.rows],
            "metrics": [asdict(metric) for metric in self.metrics],
            "best_by": self.best_by,
            "best": None if pair is None else {row.model: row.guidance_scale for row in pair},
            "ratios": [asdict(self.ratio(*both)) for both in self.pairs],
            "ratio_at_best": None if pair is None else asdict(self.ratio(*pair)),
            "setting": asdict(self.setting),
            "notes": list(self.notes),
        }


def mark_best(rows: tuple[Row, ...], metrics: tuple[Metric, ...]) -> tuple[Row, ...]:
    """Return the rows, each with the metrics by which it is the best of its model.

    Of equals the first is; a metric that is not a number in a row is passed over there.
    """
    winners: dict[tuple[str, str], int] = {}
    for metric in metrics:
        for index, row in enumerate(rows):
            value = row.metrics.get(metric.name)
            if value is None or value != value:
                continue
            held = winners.get((row.model, metric.name))
            if held is None or metric.is_better(value, rows[held].metrics[metric.name]):
                winners[row.model, metric.name] = index
    return tuple(
        replace(
            row, best_by=tuple(m.name for m in metrics if winners.get((row.model, m.name)) == index)
        )
        for index, row in enumerate(rows)
    )
