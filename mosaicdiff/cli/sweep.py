"""`mosaicdiff sweep`: quality against cost, for several budgets from one calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import (
    check_calibration,
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
    pipeline_config_option,
    print_json,
    prompt_source,
    told_progress,
)
from .request_options import allocation_options, calibration_options, read_config

if TYPE_CHECKING:
    from ..sweeping import FrontPoint


@click.command(
    epilog=examples(
        "mosaicdiff sweep digits --budgets 10%,20%,30%,40%,50%,60%",
        "mosaicdiff sweep digits --budgets 20%,40% --against score,uniform --measure",
        "mosaicdiff sweep digits --from digits.cal --unit macs --budgets 0.8x,0.6x --plot f.png",
    )
)
@click.argument("model")
@click.option("--budgets", required=True, help="Separated by commas: 10%,20% or 0.8x,0.6x.")
@click.option(
    "--unit", type=click.Choice(("sparsity", "macs", "params", "size")), default="sparsity",
    show_default=True, help="Of the budgets.",
)  # fmt: skip
@click.option("--against", help="More allocations to draw: score,uniform.")
@click.option("--measure", is_flag=True, help="Prune and sample each, and measure its error.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the front into this file.")
@click.option(
    "--from", "measured", type=click.Path(path_type=Path),
    help="File that `mosaicdiff calibrate` wrote: the model is not calibrated again.",
)  # fmt: skip
@allocation_options
@calibration_options
@pipeline_config_option
@device_option
@dtype_option
@json_option
@click.pass_context
@guarded
def sweep(context: click.Context, as_json: bool, **options: Any) -> None:
    """Say what pruning MODEL to each of several budgets costs and loses. Nothing is written.

    The error is predicted from the layers' errors: it ranks the budgets of one model, and is
    several times too low. With --measure each is pruned and sampled, and its final latents are
    compared with the dense model's.
    """
    from .plots import check_plot_file, draw_front

    config = read_config(context, options)
    plot: Path | None = options["plot"]
    if plot is not None:
        check_plot_file(plot)
    check_calibration(options["calibration"])
    prompts = prompt_source(options)
    from ..allocation.budget import Budget
    from ..sources import load_pipeline
    from ..sweeping import sweep as run

    budgets = [Budget.parse(options["unit"], text) for text in options["budgets"].split(",")]
    first = config.allocation
    others = [name for name in (options["against"] or "").split(",") if name and name != first]
    device = pick_device(options["device"])
    dtype = pick_dtype(options["dtype"], device)
    pipe = load_pipeline(options["model"], dtype, device, options["pipeline_config"])
    with told_progress() as tell:
        points = run(
            pipe, budgets, config, allocations=[first, *others], measure=options["measure"],
            calibration=options["calibration"], measured=options["measured"],
            prompts=prompts, cache=not options["no_cache"],
            progress=tell,
        )  # fmt: skip
    if plot is not None:
        draw_front(plot, points)
    if as_json:
        values = {"points": [point.to_dict() for point in points], "config": config.to_dict()}
        print_json(values | {"plot": None if plot is None else str(plot)})
        return
    _print_points(points)
    if plot is not None:
        click.echo(f"wrote {plot}")


def _print_points(points: list[FrontPoint]) -> None:
    from rich.table import Table

    table = Table(title="front")
    for column in ("allocation", "budget"):
        table.add_column(column)
    for column in ("sparsity", "by stage", "MACs an image", "parameters", "size", "error"):
        table.add_column(column, justify="right")
    measured = points[0].measured_error is not None
    for point in points:
        error = point.measured_error if measured else point.predicted_error
        table.add_row(
            point.allocation,
            point.budget,
            f"{point.sparsity:.1%}",
            " ".join(f"{share:.2f}" for share in point.stages.values()),
            f"{human_count(point.macs)} ({point.macs_ratio:.2f}x fewer)",
            human_count(point.params),
            human_bytes(point.bytes),
            f"{error:.4g}",
        )
    console().print(table)
    kind = "measured on final latents" if measured else "predicted from the layers"
    console().print(f"errors are {kind}", highlight=False)
