"""The options that say how to prune, shared by `prune`, `calibrate` and `sweep`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..allocation.budget import UNITS
from ..config import PruneConfig
from ..config_checks import (
    ACTIVATIONS,
    ALLOCATIONS,
    CHOICES,
    COMPENSATIONS,
    CRITERIA,
    DEPTH_RANKS,
    SHARED_NORMS,
    WEIGHTINGS,
)
from ..search_config import FITNESSES, GENES, STARTS, WITHIN, SearchConfig
from ..trajectory.schedule import FLOW_SNR_WEIGHT, FLOW_THRESHOLD, SNR_WEIGHT, THRESHOLD
from ..trajectory.weights import WEIGHTS as STEP_WEIGHTS
from ..trajectory_config import TrajectoryConfig
from .common import parse_pipeline_options, pipeline_option
from .input_options import batch_option, input_options, parse_count, parse_size

_DEFAULTS = PruneConfig()
_SEARCH = SearchConfig()
_TRAJECTORY = TrajectoryConfig()
_NAMED = ALLOCATIONS[:-1]

#: Fields of PruneConfig whose options have their names and need no reading.
_FIELDS = (
    "weighting", "choice", "granularity", "depth_rank", "least_heads", "least_neurons",
    "latency_batch", "latency_table", "bins", "max_stages", "probe_samples", "criterion",
    "compensation", "samples", "seed", "steps", "threshold", "snr_weight", "max_sparsity",
    "null_share", "damping", "activations", "shared_norms",
)  # fmt: skip
_SEARCH_FIELDS = {
    "search_genes": "genes", "search_within": "within", "fitness": "fitness",
    "generations": "generations", "population": "population", "offspring": "offspring",
    "survivors": "survivors",
}  # fmt: skip

#: Of TrajectoryConfig.
_TRAJECTORY_FIELDS = {
    "trajectories": "samples", "trajectory_batch": "batch_size", "guidance_scale": "guidance_scale",
}  # fmt: skip

Command = Callable[..., Any]


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _number(name: str, text: str) -> Callable[[Command], Command]:
    field = name.removeprefix("--").replace("-", "_")
    return click.option(name, default=getattr(_DEFAULTS, field), show_default=True, help=text)


def _choice(name: str, choices: tuple[str, ...], text: str) -> Callable[[Command], Command]:
    field = name.removeprefix("--").replace("-", "_")
    return click.option(
        name, type=click.Choice(choices), default=getattr(_DEFAULTS, field), show_default=True,
        help=text,
    )  # fmt: skip


budget_options = _options(
    click.option(
        "--sparsity",
        help="Budget: share of the prunable MACs to remove, mean over the sampling steps: 0.3 or "
        "30%. Where single weights go: of the weights of every linear that is chosen.  "
        "[default: 30%]",
    ),
    click.option("--macs", help="Budget: of one image, all steps: 0.6x of the dense, or 3.9T."),
    click.option("--params", help="Budget: in the checkpoint, all stages: 0.8x, or 450M."),
    click.option("--size", help="Budget: of the weights file: 0.8x, or 1.2GB."),
    click.option("--latency", help="Budget: of a call on this device: 0.7x, or 25ms."),
    click.option(
        "--quality",
        help="Budget: prune as far as the squared error of the final latents, over their energy, "
        "stays under this: 0.01.",
    ),
)


component_option = click.option(
    "--component",
    help="Of a pipeline with two denoisers (Wan 2.2): transformer or transformer_2.",
)


calibration_options = _options(
    click.option(
        "--stages",
        help="3 (early, middle, late), another number (equal steps; 1 is one network), auto (from "
        "the data), or timesteps that part them: 104,570.  [default: 3; 10 for evolutionary]",
    ),
    _number("--bins", "Of --stages auto: runs of steps whose edges may part stages."),
    *input_options,
    _choice(
        "--activations",
        ACTIVATIONS,
        "Whose are seen: of clean latents noised, or of the pipeline along its trajectory, which "
        "needs no pictures.",
    ),
    click.option(
        "--trajectories",
        default=_TRAJECTORY.samples,
        show_default=True,
        help="Pictures sampled, all stages together.",
    ),
    click.option(
        "--trajectory-batch",
        default=_TRAJECTORY.batch_size,
        show_default=True,
        help="Pictures sampled at once.",
    ),
    click.option(
        "--timestep-weights",
        default=_TRAJECTORY.weights,
        show_default=True,
        help=f"How much each step counts: {', '.join(STEP_WEIGHTS)}, or a number for each step, "
        "noisiest first: 1,1,0.5,0.5.",
    ),
    click.option(
        "--guidance-scale",
        type=float,
        help="Of trajectory, and where captions are encoded.  [default: the pipeline's own]",
    ),
    pipeline_option("Of trajectory, and where captions are encoded"),
    _number("--samples", "Calibration samples for each stage (or bin)."),
    batch_option,
    _number("--seed", "Of all that is drawn."),
    _number("--steps", "Sampling steps that the plan is made for."),
    click.option(
        "--threshold",
        type=float,
        help="M: the middle stage is where the score is so much of its largest.  "
        f"[default: {THRESHOLD:g}; {FLOW_THRESHOLD:g} with flow matching]",
    ),
    click.option(
        "--snr-weight",
        type=float,
        help="lambda: weight of ln SNR in the score.  "
        f"[default: {SNR_WEIGHT:g}; {FLOW_SNR_WEIGHT:g} with flow matching]",
    ),
    _number("--null-share", "Share of calibration samples with the null condition."),
    _choice("--criterion", CRITERIA, "What is worth keeping: second order, or a baseline."),
    _choice(
        "--compensation", COMPENSATIONS, "Refit by least squares, with a new bias too, or not."
    ),
    _number("--damping", "Relative to the mean of the Hessian's diagonal."),
    _choice("--choice", CHOICES, "Groups kept in the stages: their own, nested, or the same."),
    _choice("--weighting", WEIGHTINGS, "Of the layers' errors in optimal."),
    _number(
        "--granularity",
        "What goes at once: structured (heads and neurons), whole layers or blocks, or single "
        "weights: unstructured, or N:M such as 2:4.",
    ),
    _choice("--depth-rank", DEPTH_RANKS, "What whole layers or blocks are ranked by."),
    click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path),
        help="JSON file of PruneConfig fields; options given here win.",
    ),
)

allocation_options = _options(
    click.option(
        "--allocation",
        help=f"{', '.join(_NAMED)}, or one share for each stage, noisiest first: 0.5,0.1,0.4.  "
        "[default: optimal; uniform where single weights go]",
    ),
    click.option(
        "--layer-sparsity",
        multiple=True,
        help="Of layers whose names match: '*.ff=0.6', or one share for each stage: "
        "'*.ff=0.6,0.2,0.5'; repeatable, the last that matches counts.",
    ),
    _number("--max-sparsity", "The most one stage may give."),
    _number("--max-stages", "Of --stages auto."),
    click.option(
        "--round-to",
        default=str(_DEFAULTS.round_to),
        show_default=True,
        help="Keep FFN neurons in multiples of this; auto: neurons and heads in those that are "
        "worth their time on --device, which is measured once (--latency-batch rows).",
    ),
    _choice(
        "--shared-norms",
        SHARED_NORMS,
        "Norms over all heads (Wan, LTX, Sana 1.5): their projections whole, or cut.",
    ),
    _number("--least-heads", "Heads that every attention keeps."),
    _number("--least-neurons", "Neurons that every FFN keeps."),
    click.option(
        "--include",
        multiple=True,
        help="Layers or blocks that may be pruned, e.g. '*.ff'; repeatable.  [default: all]",
    ),
    click.option(
        "--exclude",
        multiple=True,
        help="Layers or blocks left whole, e.g. transformer_blocks.0 or '*.attn1'; repeatable.",
    ),
    click.option(
        "--whole-ends/--prune-ends",
        default=None,
        help="Leave the first and last block whole, or not.  [default: with joint attention]",
    ),
    _number("--latency-batch", "Rows of a call for --latency."),
    click.option("--latency-table", help="File of layer timings, instead of measuring them."),
    _number("--probe-samples", "Samples that measured errors are taken over."),
)

package_options = _options(
    click.option(
        "--packages",
        default="1",
        show_default=True,
        help="Parts of the network, each calibrated with those before it pruned; auto: as few as "
        "--memory allows.",
    ),
    click.option(
        "--memory",
        help="What a package may take beside the model and its activations: 20GiB. Of --packages "
        "auto; a number of packages that does not fit is refused.",
    ),
    click.option(
        "--resume",
        type=click.Path(path_type=Path),
        help="Folder of an interrupted run in packages, to go on from (OUTPUT.packages).",
    ),
)

search_options = _options(
    click.option("--search-time", help="Of evolutionary: 90s, 10m, 2h.  [default: no limit]"),
    click.option(
        "--search-state",
        type=click.Path(path_type=Path),
        help="File that keeps the search; one that is there is gone on with.  "
        "[default: OUTPUT.search.json]",
    ),
    click.option(
        "--search-genes", type=click.Choice(GENES), default=_SEARCH.genes, show_default=True,
        help="What gets a level: a stage, or every layer of every stage.",
    ),
    click.option(
        "--search-within", type=click.Choice(WITHIN), default=_SEARCH.within,
        show_default=True, help="How the layers of a stage share its level.",
    ),
    click.option(
        "--search-start", default=",".join(STARTS), show_default=True,
        help="Allocations that the search starts from.",
    ),
    click.option(
        "--fitness", default=_SEARCH.fitness, show_default=True,
        help=f"{', '.join(FITNESSES)}, or iqa:NAME of pyiqa.",
    ),
    click.option("--generations", default=_SEARCH.generations, show_default=True),
    click.option("--population", default=_SEARCH.population, show_default=True, help="At first."),
    click.option("--offspring", default=_SEARCH.offspring, show_default=True, help="Each time."),
    click.option("--survivors", default=_SEARCH.survivors, show_default=True, help="Each time."),
)  # fmt: skip


def read_config(context: click.Context, options: dict[str, Any]) -> PruneConfig:
    """Merge defaults, the file, and the options given on the command line, in that order.

    Raises:
        ValueError: an option cannot be read, or the fields do not fit together.
    """
    file = options["config_file"]
    values = PruneConfig.from_file(file).to_dict() if file else {}

    def given(name: str) -> bool:
        if name not in options:
            return False
        return not file or context.get_parameter_source(name) == ParameterSource.COMMANDLINE

    budgets = {name: options[name] for name in UNITS if options.get(name) is not None}
    if budgets:  # a budget given here takes the place of the file's
        values = {name: value for name, value in values.items() if name not in UNITS} | budgets
    values.update({name: options[name] for name in _FIELDS if given(name)})
    for name in ("batch_size", "round_to"):
        if given(name):
            values[name] = parse_count(options[name])
    if given("allocation") and options["allocation"] is not None:
        values.update(_parse_allocation(options["allocation"]))
    if given("stages") and options["stages"] is not None:
        values.update(_parse_stages(options["stages"], values.get("steps", options["steps"])))
    for name in ("include", "exclude"):
        if given(name):
            values[name] = tuple(options[name])
    if given("packages"):
        values["packages"] = parse_count(options["packages"])
    if given("memory") and options["memory"] is not None:
        values["memory"] = options["memory"]
    if given("whole_ends"):
        values["whole_ends"] = options["whole_ends"]
    if given("layer_sparsity") and options["layer_sparsity"]:
        values["layer_sparsity"] = dict(map(_parse_layer_share, options["layer_sparsity"]))
    search = dict(values.get("search", {}))
    search.update({field: options[name] for name, field in _SEARCH_FIELDS.items() if given(name)})
    if given("search_start"):
        search["start"] = tuple(options["search_start"].split(","))
    if given("search_time") and options["search_time"] is not None:
        search["seconds"] = parse_seconds(options["search_time"])
    trajectory = dict(values.get("trajectory", {}))
    trajectory.update({f: options[name] for name, f in _TRAJECTORY_FIELDS.items() if given(name)})
    if given("timestep_weights"):
        trajectory["weights"] = _parse_step_weights(options["timestep_weights"])
    more = parse_pipeline_options(options.get("pipeline_option") or ())
    if options.get("image_size") is not None:
        more |= parse_size(options["image_size"], more)
    if more:
        trajectory["options"] = dict(trajectory.get("options", {})) | more
    return PruneConfig.from_dict(values | {"search": search, "trajectory": trajectory})


def parse_seconds(text: str) -> float:
    """Read a time such as 90s, 10m or 2h.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text.strip())
    if match is None:
        raise ValueError(f"--search-time must be such as 90s, 10m or 2h, got {text!r}.")
    return float(match.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600}[match.group(2)]


def _parse_allocation(text: str) -> dict[str, Any]:
    if text in _NAMED:
        return {"allocation": text, "stage_sparsity": None, "layer_sparsity": None}
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--allocation must be {', '.join(_NAMED)} or shares such as 0.5,0.1,0.4, got {text!r}."
        ) from None
    return {"allocation": "explicit", "stage_sparsity": shares}


def _parse_step_weights(text: str) -> str | tuple[float, ...]:
    if text in STEP_WEIGHTS:
        return text
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--timestep-weights must be one of {', '.join(STEP_WEIGHTS)}, or a number for each "
            f"step such as 1,1,0.5,0.5, got {text!r}."
        ) from None


def _parse_layer_share(text: str) -> tuple[str, float | tuple[float, ...]]:
    pattern, _, shares = text.rpartition("=")
    try:
        numbers = tuple(float(part) for part in shares.split(","))
    except ValueError:
        numbers = ()
    if not pattern or not numbers:
        raise ValueError(f"--layer-sparsity must be PATTERN=SHARE, e.g. '*.ff=0.6', got {text!r}.")
    return pattern, numbers[0] if len(numbers) == 1 else numbers


def _parse_stages(text: str, steps: int) -> dict[str, Any]:
    """Read `--stages`; one number above the sampling steps can only be a timestep."""
    if text == "auto":
        return {"stages": "auto", "boundaries": None}
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--stages must be a number, auto, or timesteps such as 104,570, got {text!r}."
        ) from None
    if len(numbers) == 1 and numbers[0] <= steps:
        return {"stages": numbers[0], "boundaries": None}
    return {"boundaries": tuple(numbers), "stages": None}
