"""`mosaicdiff bench`: time and memory of denoiser calls, dense beside pruned, in every mode."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import (
    check_positive,
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
    told_progress,
)

if TYPE_CHECKING:
    from ..evaluate.bench import BenchReport


@click.command(
    epilog=examples(
        "mosaicdiff bench out/digits-30 --batch-sizes 1,64",
        "mosaicdiff bench dit-xl-2 --sparsity 0.33 --batch-sizes 4 --modes eager,fused",
        "mosaicdiff bench sdxl --device cuda --modes eager,fused,compiled,graphs --json",
    )
)
@click.argument("model")
@click.option("--against", help="The dense model.  [default: the one it was pruned from]")
@click.option(
    "--modes",
    default="eager,fused",
    show_default=True,
    help="How both are run: eager (as diffusers does), fused, compiled, graphs (CUDA), "
    "compiled-graphs.",
)
@click.option("--batch-sizes", default="2", show_default=True, help="Rows of a call, e.g. 1,8,32.")
@click.option(
    "--steps", default="50", show_default=True, help="Sampling steps of an image, e.g. 20,50."
)
@click.option("--sparsity", type=float, help="Of a configuration.  [default: 0.33]")
@click.option("--round-to", help="Of a configuration: a multiple, or auto.  [default: 64]")
@click.option("--repeats", default=10, show_default=True, help="Rounds over all networks.")
@click.option(
    "--where/--no-where", default=True, show_default=True, help="Profile where the time goes."
)
@pipeline_config_option
@device_option
@dtype_option
@json_option
@guarded
def bench(
    model: str,
    against: str | None,
    modes: str,
    batch_sizes: str,
    steps: str,
    sparsity: float | None,
    round_to: str | None,
    repeats: int,
    where: bool,
    pipeline_config: str | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Time MODEL, a pruned folder or a configuration with random weights, beside the dense one.

    Configurations: dit-xl-2, dit-b-4, sdxl, sd3.5-large, flux-dev, pixart-sigma-xl, wan-2.1-14b.

    All networks and modes run in turn, call by call, at the native size. The efficiency is the
    speed-up over the dense network in the same mode, divided by the ratio of MACs, attention
    products counted: 1 is what the arithmetic allows. One step is one call, two with guidance.
    """
    check_positive(repeats=repeats)
    sizes, counts = _numbers("--batch-sizes", batch_sizes), _numbers("--steps", steps)
    target = pick_device(device)
    number = pick_dtype(dtype, target)
    # The profiler's library announces itself on standard error at this level and below.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from ..config import PruneConfig
    from ..evaluate.bench import bench_modes
    from ..evaluate.configurations import (
        CONFIGURATIONS,
        random_denoiser,
        random_staged,
        usual_scheduler,
    )
    from ..evaluate.latency import check_modes
    from ..evaluate.room import check_room

    names = list(dict.fromkeys(name.strip() for name in modes.split(",") if name.strip()))
    check_modes(names, target)
    scheduler: Any
    if model in CONFIGURATIONS:
        if against is not None:
            raise ValueError(
                f"bench: --against must be left out with a configuration, got {against!r}: {model} "
                "is pruned on the spot."
            )
        config = PruneConfig(
            sparsity=0.33 if sparsity is None else sparsity,
            steps=counts[0],
            round_to=_rounding("64" if round_to is None else round_to),
            allocation="score",
        )
        check_room(model, config, target, number)
        dense = random_denoiser(model, target, number)
        staged, scheduler = random_staged(dense, config), usual_scheduler(dense)
    else:
        for option, given in (("--sparsity", sparsity), ("--round-to", round_to)):
            if given is not None:
                raise ValueError(
                    f"bench: {option} must be left out with a pruned folder, got {given}: {model} "
                    "is pruned already. Prune again, or bench a configuration."
                )
        dense, staged, scheduler = _load_pair(model, against, number, target, pipeline_config)
    with told_progress(as_json) as tell:
        report = bench_modes(
            model, dense, staged, scheduler, modes=names, batch_sizes=sizes, steps=counts,
            repeats=repeats, where=where, tell=tell,
        )  # fmt: skip
    if as_json:
        print_json(report.to_dict())
        return
    _print_report(report)


def _numbers(option: str, text: str) -> list[int]:
    """Read whole numbers above 0 with commas between."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(
            f"bench: {option} must be whole numbers from 1 on, with commas between, got {text!r}."
        )
    return list(dict.fromkeys(found))


def _rounding(text: str) -> Any:
    """Read a multiple, or `auto`."""
    if text == "auto":
        return text
    return _numbers("--round-to", text)[0]


def _load_pair(
    model: str, against: str | None, dtype: Any, device: Any, place: str | None
) -> tuple[Any, Any, Any]:
    from ..evaluate.configurations import CONFIGURATIONS
    from ..runtime import StagedDenoiser
    from ..sources import find_denoiser, load_pipeline

    if not Path(model).exists() and "/" not in model and model != "digits":
        raise ValueError(
            f"bench: model must be a pruned folder or one of {', '.join(CONFIGURATIONS)}, "
            f"got {model!r}."
        )
    pipe = load_pipeline(model, dtype, device, place)
    _, staged = find_denoiser(pipe)
    if not isinstance(staged, StagedDenoiser):
        raise ValueError(f"bench: {model} must be pruned, but it is dense. Prune it first.")
    source = against or staged.info.source
    if source is None:
        raise ValueError(f"bench: --against must name the dense model that {model} came from.")
    place = place if source.endswith(".safetensors") else None
    dense = find_denoiser(load_pipeline(source, dtype, device, place))[1]
    return dense, staged, pipe.scheduler


def _print_report(report: BenchReport) -> None:
    from rich.table import Table

    table = Table(
        title=f"{report.model}, {report.dtype}, {report.device}, {report.threads} threads, "
        f"median of {report.repeats} rounds"
    )
    table.add_column("mode")
    table.add_column("network")
    for column in (
        "rows", "steps", "ms a step", "ms an image", "peak", "speed-up", "efficiency", "over eager",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in report.rows:
        pruned = row.network == "pruned"
        table.add_row(
            row.mode, row.network, str(row.batch_size), str(row.steps), f"{row.milliseconds:.2f}",
            f"{row.milliseconds_per_image:.1f}",
            "-" if row.peak_bytes is None else human_bytes(row.peak_bytes),
            f"{row.speedup:.3f}x" if pruned else "", f"{row.efficiency:.3f}" if pruned else "",
            f"{row.over_eager:.2f}x", end_section=pruned,
        )  # fmt: skip
    out = console()
    out.print(table)
    out.print(*_macs_lines(report), sep="\n", highlight=False)
    if report.time:
        out.print(_time_table(report))
    out.print(*_memory_lines(report), sep="\n", highlight=False)


def _macs_lines(report: BenchReport) -> list[str]:
    """MACs depend on the number of steps alone."""
    found = {row.steps: row for row in report.rows if row.network == "pruned"}
    whole = report.rows[0]
    return [
        f"MACs of a call with {steps} steps: dense {human_count(whole.macs_with_attention)} "
        f"({human_count(whole.macs)} without attention products), pruned "
        f"{human_count(row.macs_with_attention)} ({human_count(row.macs)}), "
        f"{row.macs_ratio:.3f}x fewer"
        for steps, row in found.items()
    ]


def _time_table(report: BenchReport) -> Any:
    from rich.table import Table

    parts = ("products", "attention", "norms", "rest", "launches")
    rows = report.time[0]["batch_size"]
    title = f"where the time of a call goes, ms ({rows} row{'s' * (rows > 1)})"
    table = Table(title=title)
    table.add_column("mode")
    table.add_column("network")
    for part in parts:
        table.add_column(part, justify="right")
    for row in report.time:
        total = sum(row[part] for part in parts)
        cells = [f"{row[part]:.2f} ({row[part] / total:.0%})" for part in parts]
        table.add_row(row["mode"], row["network"], *cells)
    return table


def _memory_lines(report: BenchReport) -> list[str]:
    stated, measured = report.memory["stated"], report.memory["measured"]
    ratios = stated["of_dense_distinct"]
    parameters = report.memory["parameters"]
    lines = [
        f"weights: pruned {human_count(parameters['pruned'])} parameters in all stages; dense "
        f"{human_count(parameters['dense'])}, {human_bytes(stated['dense'])}"
    ]
    if stated["dense_distinct"] != stated["dense"]:
        lines[0] += f", {human_bytes(stated['dense_distinct'])} without equal copies (1x)"
    for name, key, found in (
        ("on disk", "disk", None),
        ("all stages resident", "resident", measured["resident"]),
        ("one stage swapped in", "swap_device", measured["swap"]),
    ):
        line = f"  {name}: {human_bytes(stated[key])} ({ratios[key]:.2f}x)"
        if found is not None:
            line += f", measured {human_bytes(sum(found['live'].values()))}"
        lines.append(line)
    lines[-1] += f"; {human_bytes(stated['swap_host'])} in the host's memory"
    return lines
