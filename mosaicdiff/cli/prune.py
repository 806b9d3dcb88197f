"""`mosaicdiff prune`: the main job."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import PruneConfig
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
from .dry_run import dry_run
from .request_options import (
    allocation_options,
    budget_options,
    calibration_options,
    component_option,
    package_options,
    read_config,
    search_options,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..groups import PrunableLayer
    from ..report import PruneReport


@click.command(
    epilog=examples(
        "mosaicdiff prune digits --output out/digits-30",
        "mosaicdiff prune digits --output out/digits-fast --macs 0.6x --round-to 64",
        "mosaicdiff prune digits --output out/digits-score --sparsity 0.5 --allocation score",
        "mosaicdiff prune digits --from digits.cal --output out/digits-50 --sparsity 50%",
        "mosaicdiff prune digits --output out/found --allocation evolutionary --search-time 2m",
        "mosaicdiff prune digits --output out/sampled --activations trajectory --trajectories 32",
        "mosaicdiff prune ./sd3 --output out/sd3 --activations trajectory --prompts prompts.txt "
        "--guidance-scale 5 --pipeline-option height=512 --pipeline-option width=512",
        "mosaicdiff prune ./DiT-XL-2-256 --calibration latents.npz --output out/dit --round-to 64",
        "mosaicdiff prune sdxl.safetensors --pipeline-config ./sdxl --output pruned.safetensors "
        "--calibration latents.safetensors",
        "mosaicdiff prune digits --output out/digits-30 --dry-run",
    )
)
@click.argument("model")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="New folder; of a single file also a new .safetensors in its layout.",
)
@budget_options
@allocation_options
@calibration_options
@click.option(
    "--from", "measured", type=click.Path(path_type=Path),
    help="File that `mosaicdiff calibrate` wrote: the model is not run again.",
)  # fmt: skip
@component_option
@package_options
@pipeline_config_option
@search_options
@device_option
@dtype_option
@click.option(
    "--semi-structured",
    is_flag=True,
    help="Of 2:4: time a call with torch's semi-structured sparse tensors too (CUDA, 8.0 or more).",
)
@click.option("--overwrite", is_flag=True, help="Replace an output folder that is not empty.")
@click.option("--dry-run", is_flag=True, help="Print the plan, its memory and time; write nothing.")
@json_option
@click.pass_context
@guarded
def prune(context: click.Context, as_json: bool, **options: Any) -> None:
    """Prune MODEL (digits, a diffusers folder, a Hub id or a .safetensors) and save it.

    At most one budget is given: --sparsity, --macs, --params, --size, --latency or --quality.
    """
    config = read_config(context, options)
    output: Path | None = options["output"]
    if output is None and not options["dry_run"]:
        raise ValueError("--output must name a new folder, got nothing. Or look with --dry-run.")
    from ..distributed import World

    world = World.current()  # before a device is picked: each process has its own
    device = pick_device(options["device"])
    dtype = pick_dtype(options["dtype"], device)
    if options["semi_structured"]:
        from ..semi_structured import check_device

        check_device(device)
    from ..files import check_model_folder, check_output_folder, whole_folder
    from ..pipeline import prune as run
    from ..single_file import save_single_file
    from ..sources import DIGITS, load_pipeline

    model, place = options["model"], options["pipeline_config"]
    in_one = output is not None and output.suffix == ".safetensors"
    if output is not None and in_one:
        _check_single_file(model, output, options["overwrite"])
    elif output is not None:
        if output.exists() and Path(model).exists() and output.samefile(model):
            raise ValueError(
                f"--output must be another folder than the model's, got {output} for both: the "
                "dense model would be lost."
            )
        check_output_folder(output, options["overwrite"])
        check_model_folder(output)
    calibration, measured = options["calibration"], options["measured"]
    check_calibration(calibration)
    prompts, cache = prompt_source(options), not options["no_cache"]
    pipe = load_pipeline(model, dtype, device, place)
    if in_one:
        _check_layout(model, pipe)
    if options["dry_run"] or output is None:
        component = options["component"]
        dry_run(pipe, config, calibration, measured, prompts, cache, component, as_json)
        return
    search = options["search_state"]
    if config.allocation == "evolutionary" and search is None:
        search = output.with_name(output.name + ".search.json")
    if search is not None and search.is_file():
        click.echo(f"going on with the search in {search}", err=True)
    resume = options["resume"]
    in_parts = config.packages != 1 and resume is None
    state = output.with_name(output.name + ".packages") if in_parts else None
    with told_progress(quiet=not world.is_first) as tell:
        result = run(
            pipe, config, calibration=calibration, measured=measured, prompts=prompts,
            cache=cache, search_state=search, state=state, resume=resume, progress=tell,
            component=options["component"],
        )  # fmt: skip
    if not world.is_first:
        return
    if result.denoiser.info.source == DIGITS:
        pipe.register_to_config(_name_or_path=DIGITS)  # not the place it is installed at
    if in_one:
        save_single_file(
            result.denoiser, output, source=model, config=place, overwrite=options["overwrite"]
        )
    else:
        with whole_folder(output, options["overwrite"]) as temporary:
            pipe.save_pretrained(temporary)
    # What they found is in the output now.
    if search is not None and options["search_state"] is None:
        search.unlink(missing_ok=True)
    if state is not None or resume is not None:
        shutil.rmtree(state or resume)
    report, sparse = result.report, None
    if options["semi_structured"]:
        from ..semi_structured import to_semi_structured

        sparse = to_semi_structured(result.denoiser)
    if as_json:
        values = report.to_dict() | {"output": str(output), "config": config.to_dict()}
        values["others"] = [other.report.to_dict() for other in result.others]
        print_json(values | {"semi_structured": None if sparse is None else sparse.to_dict()})
        return
    for part in (result, *result.others):
        if result.others:
            console().rule(str(part.component))
        if config.round_to == "auto":
            console().print(_units(part.denoiser.info.layers), highlight=False)
        _print_report(part.report, config, output)
    if sparse is not None and sparse.gain is not None:
        console().print(
            f"as semi-structured sparse tensors a call takes {1 / sparse.gain:.3f} times as long "
            f"({len(sparse.skipped[0])} linears stayed dense)",
            highlight=False,
        )


def _steps(report: PruneReport) -> int:
    return sum(stage.steps for stage in report.stages)


def _check_single_file(model: str, output: Path, overwrite: bool) -> None:
    """Refuse an output that is a file, before a model is loaded, where it cannot be written.

    Raises:
        ValueError: MODEL is no single file, or the output is there.
    """
    from ..single_file import check_target

    if Path(model).suffix != ".safetensors":
        raise ValueError(
            f"--output must name a new folder for {model}, got {output}: only a model that came "
            "in a single file has the layout to be written in one."
        )
    check_target(output, overwrite)


def _check_layout(model: str, pipe: DiffusionPipeline) -> None:
    """Refuse a file that the pruned model could not be written back as, before any work.

    Raises:
        ValueError: it holds another model, or the pipeline has two denoisers.
    """
    from ..single_file import check_source
    from ..sources import find_denoisers

    parts = find_denoisers(pipe)
    if len(parts) > 1:
        raise ValueError(
            f"--output must name a new folder for a pipeline with {len(parts)} denoisers "
            f"({', '.join(part.name for part in parts)}): a single file holds one of them."
        )
    denoiser = parts[0].denoiser
    check_source(Path(model), type(denoiser).__name__, dict(denoiser.config))


def _units(layers: Iterable[PrunableLayer]) -> str:
    """Say what widths were rounded to, by kind of layer."""
    found: dict[str, set[int]] = {}
    for layer in layers:
        found.setdefault(layer.kind, set()).add(layer.unit)
    said = [f"{k} in {', '.join(f'{u}s' for u in sorted(v))}" for k, v in found.items()]
    return f"worth their time on this device: {', '.join(said)}"


def _print_report(report: PruneReport, config: PruneConfig, output: Path) -> None:
    out = console()
    out.print(*report.tables())
    decision = report.decision
    if decision is not None and decision.reached is not None:
        from ..allocation.costs import describe_cost

        unit = decision.budget.split()[0]
        reached = (
            f"{decision.reached:.4g}"
            if unit == "quality"
            else describe_cost(unit, decision.reached)
        )
        search = decision.measured.get("search")
        found = (
            "" if search is None
            else f"; the search went from {search['start']:.4g} to {search['best']:.4g} in "
            f"{search['evaluations']} evaluations, {search['generations']} generations, "
            f"{search['seconds']:.0f} s"
        )  # fmt: skip
        out.print(
            f"{decision.allocation} allocation, {decision.budget} asked, {reached} reached{found}",
            highlight=False,
        )
    packages = report.packages
    if packages is not None and (packages.count > 1 or packages.memory is not None):
        out.print(
            f"{packages.count} package{'s' if packages.count > 1 else ''}, at most "
            f"{human_bytes(packages.accumulator_bytes)} of sums at a time",
            highlight=False,
        )
    if report.of_weights:
        linears = len({row.name for stage in report.stages for row in stage.weights})
        out.print(
            f"{config.budget.value:.2%} of the weights of {linears} linears asked (where "
            f"--layer-sparsity says nothing else); {report.sparsity:.2%} of those of all linears "
            "of the blocks are zero\n"
            "layers keep their shapes, so that dense time stays\n"
            f"{human_bytes(report.bytes_dense)} -> {human_bytes(report.bytes)} on disk\n"
            f"wrote {output} in {report.seconds:.1f} s",
            highlight=False,
        )
        return
    out.print(
        f"sparsity {report.sparsity:.2%} of the prunable MACs over {_steps(report)} steps; "
        f"MACs a call {human_count(report.macs_dense_with_attention)} -> "
        f"{human_count(report.macs_with_attention)} "
        f"({report.macs_dense_with_attention / report.macs_with_attention:.3f}x fewer)\n"
        f"parameters {human_count(report.parameters_dense)} -> {human_count(report.parameters)} "
        f"in all stages ({human_count(report.parameters_per_step)} in use at a step), "
        f"{human_bytes(report.bytes_dense)} -> {human_bytes(report.bytes)} on disk\n"
        f"wrote {output} in {report.seconds:.1f} s",
        highlight=False,
    )
