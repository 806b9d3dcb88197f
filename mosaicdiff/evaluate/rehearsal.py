"""What is found out before a long evaluation: bad requests, judges that do not fit, set-up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..statistics.prompts import find_condition
from .evaluation import DENSE, PRUNED
from .quality import Judges, Tally
from .reference import Reference


def check_request(
    dense: DiffusionPipeline,
    pruned: DiffusionPipeline,
    judges: Judges,
    prompts: Sequence[str] | None,
    num_images: int,
    scales: tuple[float | None, ...],
    batch_size: int,
) -> None:
    """Refuse what `compare` cannot do, before anything is drawn.

    Raises:
        ValueError: says what.
    """
    if type(dense) is not type(pruned):
        raise ValueError(
            f"compare: dense and pruned must be pipelines of one kind, got {type(dense).__name__} "
            f"and {type(pruned).__name__}."
        )
    kind, name = find_condition(type(dense).__call__), type(dense).__name__
    if kind is None:
        raise ValueError(f"compare: dense must be class-conditional or asked in words, got {name}.")
    if kind == "prompt" and not prompts:
        raise ValueError(
            f"compare: prompts must be given for {name}, which is asked in words, got none. "
            "Give a file with one in a line: --prompts FILE."
        )
    if kind != "prompt" and prompts is not None:
        raise ValueError(
            f"compare: prompts must be left out for {name}, which takes no text, got "
            f"{len(prompts)}. Labels run through all classes."
        )
    if kind != "prompt" and judges.prompt_scores:
        found = ", ".join(score.metric.title for score in judges.prompt_scores)
        raise ValueError(f"compare: {found} must be left out for {name}, which takes no text.")
    if not scales or len(set(scales)) < len(scales):
        raise ValueError(
            f"compare: guidance_scales must be at least one, each once, got {list(scales)}."
        )
    if batch_size < 1:
        raise ValueError(f"compare: batch_size must be at least 1, got {batch_size}.")
    if num_images < judges.least_images():
        raise ValueError(
            f"compare: num_images must be at least {judges.least_images()}, got {num_images}: "
            f"precision and recall look at {judges.neighbours} neighbours of each picture, the "
            f"Inception score at {judges.splits} parts."
        )


def rehearse(
    kinds: Mapping[str, DiffusionPipeline],
    judges: Judges,
    conditions: list[Any],
    sample: Callable[..., tuple[torch.Tensor, float]],
    steps: int | None,
    scales: tuple[float | None, ...],
    best_by: str | None,
    reads_labels: bool,
) -> tuple[Reference | None, str | None]:
    """Draw one short batch of each model and judge two of its pictures, before the long run.

    First calls pay for set-up, which is not to be counted; and what a judge cannot take is found
    out here. Returns the reference, and the metric that chooses the best guidance.
    """
    few = 2 if steps is None else min(2, steps)
    extremes = dict.fromkeys((scales[0], max(scales, key=lambda s: s or 0.0)))
    for scale in extremes:
        made = {
            model: sample(pipe, conditions, steps=few, guidance_scale=scale)[0]
            for model, pipe in kinds.items()
        }
    if made[DENSE].shape != made[PRUNED].shape:
        raise ValueError(
            "compare: dense and pruned must draw pictures of one shape, got "
            f"{tuple(made[DENSE].shape[1:])} and {tuple(made[PRUNED].shape[1:])}."
        )
    known, reference = [], None
    if judges.reference is not None and judges.network is not None:
        channels, height, width = made[DENSE].shape[-3:]
        reference = judges.reference((channels, height, width))
        _check_reference(reference, judges)
        seen = judges.network(made[DENSE].reshape(-1, channels, height, width)[:1])
        if seen.values.shape[1] != len(reference.moments.mean):
            raise ValueError(
                f"compare: reference must be of the {seen.values.shape[1]} features of "
                f"{judges.network.name}, got {len(reference.moments.mean)} in {reference.name}."
            )
        known = ["frechet"]
        known += [] if reference.features is None else ["precision", "recall"]
        known += [] if seen.probabilities is None else ["inception_score"]
        known += ["accuracy"] if reads_labels else []
    Tally(judges).add(made[PRUNED][:2], conditions[:2], made[DENSE][:2])
    scores = [score.metric.name for score in judges.prompt_scores]
    return reference, _chooser(best_by, known[:1] + scores + known[1:])


def _check_reference(reference: Reference, judges: Judges) -> None:
    if reference.count is not None and reference.count <= judges.neighbours:
        raise ValueError(
            f"compare: reference must have more than {judges.neighbours} pictures, got "
            f"{reference.count} in {reference.name}."
        )


def _chooser(best_by: str | None, known: list[str]) -> str | None:
    if best_by is None:
        return known[0] if known else None
    if best_by not in known:
        names = ", ".join(known) if known else "left out without a feature network or a score"
        raise ValueError(
            f"compare: best_by must be {names}, got {best_by!r}. It has to be measured of the "
            "dense model too."
        )
    return best_by
