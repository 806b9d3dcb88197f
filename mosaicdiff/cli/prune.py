"""`mosaicdiff prune`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..config import ALLOCATIONS, COMPENSATIONS, CRITERIA, PruneConfig
from .common import (
    console,
    device_option,
    dtype_option,
    examples,
    guarded,
    human_bytes,
    human_count,
    json_option,
    pick_device,
    pick_dtype,
    print_json,
    progress_bar,
)

if TYPE_CHECKING:
    from ..planning import PrunePlan

_DEFAULTS = PruneConfig()
_FIELDS = (
    "sparsity",
    "criterion",
    "compensation",
    "samples",
    "seed",
    "steps",
    "threshold",
    "snr_weight",
    "max_sparsity",
    "null_share",
    "damping",
    "round_to",
    "batch_size",
)


@click.command(
    epilog=examples(
        "mosaicdiff prune digits --output out/digits-30",
        "mosaicdiff prune digits --output out/digits-50 --sparsity 0.5 --allocation uniform",
        "mosaicdiff prune ./DiT-XL-2-256 --calibration latents.npz --output out/dit --round-to 64",
        "mosaicdiff prune digits --output out/digits-30 --dry-run",
    )
)
@click.argument("model")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option(
    "--sparsity",
    type=float,
    default=_DEFAULTS.sparsity,
    show_default=True,
    help="Share of the prunable MACs to remove, averaged over the sampling steps.",
)
@click.option(
    "--allocation",
    default=_DEFAULTS.allocation,
    show_default=True,
    help=f"{', '.join(ALLOCATIONS[:2])}, or one share for each stage, noisiest first: 0.5,0.1,0.4.",
)
@click.option(
    "--stages",
    default=str(_DEFAULTS.stages),
    show_default=True,
    help="3, 1, or timesteps that part the stages: 104,570.",
)
@click.option(
    "--criterion",
    type=click.Choice(CRITERIA),
    default=_DEFAULTS.criterion,
    show_default=True,
    help="What is worth keeping: second order, or a baseline.",
)
@click.option(
    "--compensation",
    type=click.Choice(COMPENSATIONS),
    default=_DEFAULTS.compensation,
    show_default=True,
    help="How what is kept is refitted: least squares, with a new bias too, or not.",
)
@click.option(
    "--calibration",
    help="Folder of images by class, .npz or .safetensors of latents "
    "and labels; digits needs none.",
)
@click.option(
    "--samples",
    default=_DEFAULTS.samples,
    show_default=True,
    help="Calibration samples for each stage.",
)
@click.option(
    "--batch-size",
    default=_DEFAULTS.batch_size,
    show_default=True,
    help="Calibration samples at once.",
)
@click.option("--seed", default=_DEFAULTS.seed, show_default=True)
@device_option
@dtype_option
@click.option(
    "--steps",
    default=_DEFAULTS.steps,
    show_default=True,
    help="Sampling steps that the plan is made for.",
)
@click.option(
    "--threshold",
    default=_DEFAULTS.threshold,
    show_default=True,
    help="M: the middle stage is where the score is at least this share of its largest.",
)
@click.option(
    "--snr-weight",
    default=_DEFAULTS.snr_weight,
    show_default=True,
    help="lambda: weight of ln SNR in the score.",
)
@click.option(
    "--max-sparsity",
    default=_DEFAULTS.max_sparsity,
    show_default=True,
    help="The most one stage may give.",
)
@click.option(
    "--null-share",
    default=_DEFAULTS.null_share,
    show_default=True,
    help="Share of calibration samples with the null condition.",
)
@click.option(
    "--damping",
    default=_DEFAULTS.damping,
    show_default=True,
    help="Relative to the mean of the Hessian's diagonal.",
)
@click.option(
    "--round-to",
    default=_DEFAULTS.round_to,
    show_default=True,
    help="Keep FFN neurons in multiples of this.",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="JSON file of PruneConfig fields; options given here win.",
)
@click.option("--overwrite", is_flag=True, help="Replace an output folder that is not empty.")
@click.option("--dry-run", is_flag=True, help="Print the plan, its memory and time; write nothing.")
@json_option
@click.pass_context
@guarded
def prune(context: click.Context, as_json: bool, **options: Any) -> None:
    """Prune MODEL (digits, a diffusers folder or a Hub id) and save it under --output."""
    config = _read_config(context, options)
    output: Path = options["output"]
    device = pick_device(options["device"])
    dtype = pick_dtype(options["dtype"], device)
    from ..files import check_output_folder, whole_folder
    from ..pipeline import prune as run
    from ..sources import DIGITS, load_pipeline

    check_output_folder(output, options["overwrite"])
    calibration = options["calibration"]
    if calibration is not None and not Path(calibration).exists():
        raise ValueError(
            f"calibration: {calibration} must be a folder or a file, but there is none."
        )
    pipe = load_pipeline(options["model"], dtype, device)
    if options["dry_run"]:
        _dry_run(pipe, config, calibration, as_json)
        return
    with progress_bar() as bar:
        task = bar.add_task("prepare", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        result = run(pipe, config, calibration=calibration, progress=tell)
    if result.denoiser.info.source == DIGITS:
        pipe.register_to_config(_name_or_path=DIGITS)  # not the place it is installed at
    with whole_folder(output, options["overwrite"]) as temporary:
        pipe.save_pretrained(temporary)
    report = result.report
    if as_json:
        print_json(report.to_dict() | {"output": str(output), "config": config.to_dict()})
        return
    out = console()
    out.print(report.stage_table(), report.layer_table())
    out.print(
        f"sparsity {report.sparsity:.2%} of the prunable MACs over {config.steps} steps; "
        f"MACs a call {human_count(report.macs_dense_with_attention)} -> "
        f"{human_count(report.macs_with_attention)} "
        f"({report.macs_dense_with_attention / report.macs_with_attention:.3f}x fewer)\n"
        f"parameters {human_count(report.parameters_dense)} -> {human_count(report.parameters)} "
        f"in all stages ({human_count(report.parameters_per_step)} in use at a step), "
        f"{human_bytes(report.bytes_dense)} -> {human_bytes(report.bytes)} on disk\n"
        f"wrote {output} in {report.seconds:.1f} s",
        highlight=False,
    )


def _read_config(context: click.Context, options: dict[str, Any]) -> PruneConfig:
    """Merge defaults, the file, and the options given on the command line, in that order."""
    file = options["config_file"]
    values = PruneConfig.from_file(file).to_dict() if file else {}

    def given(name: str) -> bool:
        return not file or context.get_parameter_source(name) == ParameterSource.COMMANDLINE

    values.update({name: options[name] for name in _FIELDS if given(name)})
    if given("allocation"):
        values.update(_parse_allocation(options["allocation"]))
    if given("stages"):
        values.update(_parse_stages(options["stages"]))
    return PruneConfig.from_dict(values)


def _parse_allocation(text: str) -> dict[str, Any]:
    if text in ALLOCATIONS[:2]:
        return {"allocation": text, "stage_sparsity": None, "layer_sparsity": None}
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--allocation must be {', '.join(ALLOCATIONS[:2])} or shares such as 0.5,0.1,0.4, "
            f"got {text!r}."
        ) from None
    return {"allocation": "explicit", "stage_sparsity": shares}


def _parse_stages(text: str) -> dict[str, Any]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--stages must be 3, 1, or timesteps such as 104,570, got {text!r}."
        ) from None
    if len(numbers) == 1 and numbers[0] < 10:
        return {"stages": numbers[0], "boundaries": None}
    return {"boundaries": tuple(numbers)}


def _dry_run(pipe: Any, config: PruneConfig, calibration: str | None, as_json: bool) -> None:
    from ..adapters import adapter_for
    from ..estimate import estimate_cost
    from ..pipeline import plan as make_plan
    from ..sources import find_denoiser

    final = make_plan(pipe, config, calibration=calibration)
    _, denoiser = find_denoiser(pipe)
    cost = estimate_cost(denoiser, adapter_for(denoiser), final, config)
    if as_json:
        print_json(_plan_values(final) | {"cost": cost, "config": config.to_dict()})
        return
    _print_plan(final, cost)


def _plan_values(final: PrunePlan) -> dict[str, Any]:
    return {
        "sparsity": final.sparsity,
        "stages": [
            {
                "name": stage.name,
                "first_timestep": stage.first,
                "last_timestep": stage.last,
                "steps": final.steps[k],
                "sparsity": final.stage_sparsity(k),
                "removed": {
                    layer.name: count
                    for layer, count in zip(final.layers, final.removed[k], strict=True)
                },
            }
            for k, stage in enumerate(final.division.stages)
        ],
    }


def _print_plan(final: PrunePlan, cost: dict[str, float]) -> None:
    from rich.table import Table

    table = Table(title="plan (nothing was run)")
    table.add_column("layer")
    table.add_column("dense", justify="right")
    for k, stage in enumerate(final.division.stages):
        table.add_column(
            f"{stage.name} t {stage.first + 1}..{stage.last + 1}\n{final.steps[k]} steps, "
            f"{final.stage_sparsity(k):.1%}",
            justify="right",
        )
    for index, layer in enumerate(final.layers):
        kept = [str(layer.groups - removed[index]) for removed in final.removed]
        table.add_row(layer.name, f"{layer.groups} {layer.kind}", *kept)
    console().print(
        table,
        f"mean sparsity {final.sparsity:.2%}; memory for Hessians "
        f"{human_bytes(cost['hessian_bytes'])} and for elimination "
        f"{human_bytes(cost['elimination_bytes'])}; about {cost['seconds']:.0f} s "
        f"(at {cost['rate'] / 1e9:.0f} GFLOP/s, measured)",
    )
