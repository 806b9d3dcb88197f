"""`mosaicdiff calibrate`: measure once what every budget needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from .common import (
    check_calibration,
    console,
    device_option,
    dtype_option,
    examples,
    guarded,
    human_bytes,
    json_option,
    pick_device,
    pick_dtype,
    pipeline_config_option,
    print_json,
    prompt_source,
    told_progress,
)
from .request_options import calibration_options, component_option, read_config


@click.command(
    epilog=examples(
        "mosaicdiff calibrate digits --output digits.cal",
        "mosaicdiff calibrate digits --output digits.cal --stages auto --bins 10",
        "mosaicdiff calibrate digits --output sampled.cal --activations trajectory "
        "--guidance-scale 4",
        "mosaicdiff prune digits --from digits.cal --output out/digits-40 --sparsity 40%",
    )
)
@click.argument("model")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="New file.")
@calibration_options
@component_option
@pipeline_config_option
@device_option
@dtype_option
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@click.option("--dry-run", is_flag=True, help="Print how large the file would be; write nothing.")
@json_option
@click.pass_context
@guarded
def calibrate(context: click.Context, as_json: bool, **options: Any) -> None:
    """Run MODEL over calibration samples and keep in --output all that pruning needs.

    `mosaicdiff prune --from` and `sweep --from` then make any budget without running it again.
    With --stages auto the bins are kept, and any stages made of whole bins can be asked for.
    """
    # Of the allocations, the one that takes every setting: a calibration serves them all.
    config = read_config(context, options | {"allocation": "optimal"})
    output: Path = options["output"]
    if output.is_dir():
        raise ValueError(f"--output must be a file, but {output} is a folder.")
    if output.exists() and not options["overwrite"]:
        raise ValueError(f"--output must be new, but {output} exists. Pass --overwrite.")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--output must lie in a folder that can be written to, got {output}.")
    check_calibration(options["calibration"])
    prompts, cache = prompt_source(options), not options["no_cache"]
    device = pick_device(options["device"])
    dtype = pick_dtype(options["dtype"], device)
    from ..pipeline import calibrate_job
    from ..request import prepare
    from ..sources import load_pipeline
    from ..statistics.calibration_file import save_calibration, stated_bytes

    pipe = load_pipeline(options["model"], dtype, device, options["pipeline_config"])
    job = prepare(
        pipe, config, None, options["calibration"], prompts=prompts, cache=cache,
        component=options["component"],
    )  # fmt: skip
    stated = stated_bytes(job.layers, len(job.frame.division), traced=config.stage_count != "auto")
    values = {
        "output": str(output),
        "bins": [stage.first for stage in job.frame.division.stages],
        "stated_bytes": stated,
        "config": config.to_dict(),
    }
    if not as_json:
        console().print(
            f"{len(job.frame.division)} stages or bins of {len(job.layers)} layers: about "
            f"{human_bytes(stated)}",
            highlight=False,
        )
    if not options["dry_run"]:
        with told_progress() as tell:
            measured = calibrate_job(job, tell)
        written = save_calibration(measured, output)
        values["bytes"] = written
    if as_json:
        print_json(values)
    elif not options["dry_run"]:
        console().print(f"wrote {output}, {human_bytes(written)}", highlight=False)
