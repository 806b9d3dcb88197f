"""The options that say how a model is judged, and the run behind them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .common import (
    check_positive,
    device_option,
    dtype_option,
    parse_pipeline_options,
    pick_device,
    pick_dtype,
    pipeline_option,
    progress_bar,
    prompt_source,
)
from .input_options import parse_size

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ..evaluate import Evaluation, Judges
    from ..evaluate.networks import FeatureNetwork
    from ..evaluate.reference import Reference

judging_options = (
    click.option("--against", help="The dense model.  [default: the one it was pruned from]"),
    click.option(
        "--num-images",
        type=int,
        help="Of each model at each guidance.  [default: 200; one for each of --prompts]",
    ),
    click.option(
        "--guidance-scale",
        help="One, or several separated by commas; 1 is without guidance for most models.  "
        "[default: 1; of --prompts the pipeline's own]",
    ),
    click.option("--steps", type=int, help="[default: 50; of --prompts the pipeline's own]"),
    click.option("--seed", default=0, show_default=True),
    click.option(
        "--batch-size", type=int, help="Pictures at once.  [default: 100; of --prompts 1]"
    ),
    click.option(
        "--prompts",
        type=click.Path(path_type=Path),
        help="Of models that are asked in words: .txt with one in a line, .json, .jsonl, .csv or "
        ".tsv; used in turn.",
    ),
    click.option("--prompt-column", help="Column of --prompts.  [default: prompt, caption, text]"),
    click.option("--image-size", help="512, or 480x832 high x wide.  [default: the pipeline's]"),
    pipeline_option("Of its call"),
    click.option(
        "--features",
        help="Network of Frechet distance, precision, recall and Inception score: digits, "
        "inception (needs torch-fidelity), inception:WEIGHTS or none.  [default: digits for the "
        "embedded model, else none]",
    ),
    click.option(
        "--reference",
        help="Real pictures for --features: a folder, or .npz with mu and sigma, features, or "
        "pictures arr_0.  [default: the data of digits]",
    ),
    click.option(
        "--save-reference",
        type=click.Path(path_type=Path),
        help="Keep the features of --reference in this .npz.",
    ),
    click.option("--clip-score", metavar="MODEL", help="Score prompts by a CLIP model (Hub id or "
                 "folder; needs transformers)."),
    click.option("--image-reward", is_flag=True, help="Score prompts by ImageReward (needs "
                 "image-reward)."),
    click.option(
        "--lpips",
        type=click.Choice(["alex", "vgg", "squeeze"]),
        help="Learned distance to the dense pictures (needs lpips).",
    ),
    click.option("--neighbours", default=3, show_default=True, help="k of precision and recall."),
    click.option("--splits", default=1, show_default=True, help="Parts of the Inception score."),
    click.option(
        "--best-by",
        help="Metric that chooses each model's best guidance.  [default: frechet, or the score of "
        "prompts]",
    ),
    click.option(
        "--state",
        type=click.Path(path_type=Path),
        help="Keep what was found in this .npz after every batch, and go on from it if it is "
        "there; it goes when all is done.",
    ),
    device_option,
    dtype_option,
)  # fmt: skip


def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of judging."""
    for option in reversed(judging_options):
        function = option(function)
    return function


def command_line() -> str:
    """Return the command that is running, as a shell takes it, without its defaults."""
    context = click.get_current_context()
    words = ["mosaicdiff", context.info_name or ""]
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        values = value if isinstance(value, tuple) else (value,)
        for each in values:
            if isinstance(parameter, click.Argument):
                words.append(str(each))
            elif each is True:
                words.append(parameter.opts[-1])
            else:
                words += [parameter.opts[-1], str(each)]
    return shlex.join(words)


def parse_scales(text: str | None) -> tuple[float | None, ...] | None:
    """Read guidance scales separated by commas.

    Raises:
        ValueError: one is no number, negative, or there twice.
    """
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found) or not all(0 <= f < math.inf for f in found):
        raise ValueError(
            "--guidance-scale must be numbers that are not negative, each once, separated by "
            f"commas, got {text!r}."
        )
    return found


def judge_model(
    model: str,
    options: Mapping[str, Any],
    look: Callable[[DiffusionPipeline], None] = lambda pruned: None,
) -> Evaluation:
    """Sample and judge a model beside its dense one, as the options say, showing progress.

    Args:
        model: as the user names it.
        options: of the command, by name.
        look: is shown the pruned pipeline as soon as it is loaded.

    Raises:
        ValueError: an option is bad; before the models are sampled.
    """
    for name in ("num_images", "steps", "batch_size", "neighbours", "splits"):
        if options[name] is not None:
            check_positive(**{name: options[name]})
    scales = parse_scales(options["guidance_scale"])
    more = parse_pipeline_options(options["pipeline_option"])
    if options["image_size"] is not None:
        more |= parse_size(options["image_size"], more)
    texts = _prompts(options)
    target = pick_device(options["device"])
    number = pick_dtype(options["dtype"], target)
    from ..evaluate import compare
    from ..evaluate.evaluation import DENSE, PRUNED
    from ..evaluate.state import check_state_file

    if options["state"] is not None:
        check_state_file(options["state"])
    # What is asked for by name is got before the models: a missing package shows at once.
    judges = _judges(options, target) if options["features"] is not None else None
    dense, pruned, against = _load(model, options["against"], number, target, look)
    if judges is None:
        judges = _judges({**options, "features": _own_features(dense)}, target)
    by_class = texts is None
    scales = ((1.0,) if by_class else (None,)) if scales is None else scales
    images = options["num_images"] or (200 if texts is None else len(texts))
    with progress_bar() as bar:
        task = bar.add_task("sample both", total=2 * images * len(scales))
        return compare(
            dense,
            pruned,
            judges=judges,
            prompts=texts,
            num_images=images,
            steps=options["steps"] or (50 if by_class else None),
            guidance_scales=scales,
            seed=options["seed"],
            batch_size=options["batch_size"] or (100 if by_class else 1),
            options=more,
            best_by=options["best_by"],
            names={DENSE: against, PRUNED: model},
            command=command_line(),
            state=options["state"],
            advance=lambda count: bar.advance(task, count),
        )


def _prompts(options: Mapping[str, Any]) -> tuple[str, ...] | None:
    source = prompt_source(options)
    if source is None:
        return None
    from ..statistics.prompts import read_prompts

    return tuple(str(value) for value in read_prompts(source, "prompt").values)


def _load(
    model: str,
    against: str | None,
    dtype: torch.dtype,
    device: torch.device,
    look: Callable[[DiffusionPipeline], None],
) -> tuple[DiffusionPipeline, DiffusionPipeline, str]:
    """Return the dense pipeline, the pruned one, and the name of the dense one."""
    from ..runtime import StagedDenoiser
    from ..sources import find_denoiser, load_pipeline

    pruned = load_pipeline(model, dtype, device)
    look(pruned)
    _, denoiser = find_denoiser(pruned)
    if against is None:
        against = denoiser.info.source if isinstance(denoiser, StagedDenoiser) else None
        if against is None:
            dense = not isinstance(denoiser, StagedDenoiser)
            why = "is not pruned" if dense else "does not say where it came from"
            raise ValueError(f"evaluate: --against must name the dense model: {model} {why}.")
    return load_pipeline(against, dtype, device), pruned, against


def _own_features(dense: DiffusionPipeline) -> str:
    from ..sources import DIGITS, source_name

    return "digits" if source_name(dense) == DIGITS else "none"


def _judges(options: Mapping[str, Any], device: torch.device) -> Judges:
    """Make what judges, and refuse what it lacks."""
    from ..evaluate.networks import feature_network
    from ..evaluate.quality import Judges
    from ..evaluate.reference import check_reference
    from ..evaluate.scores import ClipScore, ImageRewardScore, Lpips, PromptScore

    source, keep = options["reference"], options["save_reference"]
    network: FeatureNetwork | None = None
    reference = None
    if options["features"] == "none":
        given = [name for name in ("reference", "save_reference") if options[name] is not None]
        if given:
            raise ValueError(
                f"--{given[0].replace('_', '-')} must be left out without --features, got "
                f"{options[given[0]]}. Name a network: --features inception."
            )
    else:
        network = feature_network(options["features"], device)
        check_reference(source, network)
        if keep is not None:
            _check_kept(keep)
        reference = partial(_reference, source, keep, network)
    scores: list[PromptScore] = []
    if options["clip_score"] is not None:
        scores.append(ClipScore(options["clip_score"], device))
    if options["image_reward"]:
        scores.append(ImageRewardScore(device))
    return Judges(
        network=network,
        reference=reference,
        prompt_scores=tuple(scores),
        lpips=None if options["lpips"] is None else Lpips(options["lpips"], device),
        neighbours=options["neighbours"],
        splits=options["splits"],
    )


def _check_kept(path: Path) -> None:
    if path.suffix.lower() != ".npz" or not path.absolute().parent.is_dir():
        raise ValueError(f"--save-reference must be a .npz in a folder that exists, got {path}.")


def _reference(
    source: str | None, keep: Path | None, network: FeatureNetwork, shape: tuple[int, int, int]
) -> Reference:
    from ..evaluate.reference import load_reference, save_reference

    found = load_reference(source, network, shape)
    if keep is not None:
        save_reference(keep, found, network)
    return found
