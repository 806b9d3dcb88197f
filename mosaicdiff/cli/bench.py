"""`mosaicdiff bench`: time of one denoiser call, dense against pruned."""

from __future__ import annotations

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
    progress_bar,
)

if TYPE_CHECKING:
    from ..evaluate import LatencyReport


@click.command(
    epilog=examples(
        "mosaicdiff bench out/digits-30 --batch-size 64",
        "mosaicdiff bench dit-xl-2 --sparsity 0.33",
    )
)
@click.argument("model")
@click.option("--against", help="The dense model.  [default: the one it was pruned from]")
@click.option("--batch-size", default=2, show_default=True, help="Rows of one call.")
@click.option("--steps", default=50, show_default=True, help="Steps of the plan (configurations).")
@click.option("--sparsity", default=0.33, show_default=True, help="For configurations.")
@click.option("--round-to", default=64, show_default=True, help="For configurations.")
@click.option("--repeats", default=10, show_default=True, help="Rounds over all networks.")
@pipeline_config_option
@device_option
@dtype_option
@json_option
@guarded
def bench(
    model: str,
    against: str | None,
    batch_size: int,
    steps: int,
    sparsity: float,
    round_to: int,
    repeats: int,
    pipeline_config: str | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Time MODEL, a pruned folder or a configuration with random weights.

    Configurations: dit-xl-2, dit-b-4, flux-dev, sd3.5-large.

    Dense and pruned run in turn, call by call, in the same execution mode. The efficiency is the
    speed-up divided by the ratio of MACs, attention products counted: 1 is what the arithmetic
    allows.
    """
    check_positive(batch_size=batch_size, steps=steps, repeats=repeats, round_to=round_to)
    target = pick_device(device)
    number = pick_dtype(dtype, target)
    from ..config import PruneConfig
    from ..evaluate import measure_latency
    from ..evaluate.configurations import CONFIGURATIONS, random_denoiser, random_staged

    if model in CONFIGURATIONS:
        config = PruneConfig(sparsity=sparsity, steps=steps, round_to=round_to, allocation="score")
        dense = random_denoiser(model, target, number)
        staged = random_staged(dense, config)
    else:
        dense, staged = _load_pair(model, against, number, target, pipeline_config)
    with progress_bar() as bar:
        task = bar.add_task("time", total=repeats + 1)
        report = measure_latency(
            dense, staged, batch_size=batch_size, repeats=repeats, advance=lambda: bar.advance(task)
        )
    from ..evaluate.cost import denoiser_size

    sizes = {name: denoiser_size(net) for name, net in (("dense", dense), ("pruned", staged))}
    if as_json:
        print_json(report.to_dict() | {"model": model, "sizes": sizes})
        return
    _print_report(model, report, sizes)


def _load_pair(
    model: str, against: str | None, dtype: Any, device: Any, place: str | None
) -> tuple[Any, Any]:
    from ..evaluate.configurations import CONFIGURATIONS
    from ..runtime import StagedDenoiser
    from ..sources import find_denoiser, load_pipeline

    if not Path(model).exists() and "/" not in model and model != "digits":
        raise ValueError(
            f"bench: model must be a pruned folder or one of {', '.join(CONFIGURATIONS)}, "
            f"got {model!r}."
        )
    _, staged = find_denoiser(load_pipeline(model, dtype, device, place))
    if not isinstance(staged, StagedDenoiser):
        raise ValueError(f"bench: {model} must be pruned, but it is dense. Prune it first.")
    source = against or staged.info.source
    if source is None:
        raise ValueError(f"bench: --against must name the dense model that {model} came from.")
    place = place if source.endswith(".safetensors") else None
    return find_denoiser(load_pipeline(source, dtype, device, place))[1], staged


def _print_report(model: str, report: LatencyReport, sizes: dict[str, tuple[int, int]]) -> None:
    from rich.table import Table

    table = Table(
        title=f"{model}: one call of {report.batch_size} rows, {report.dtype}, {report.device}, "
        f"median of {report.repeats}"
    )
    for column in ("network", "steps", "GMACs", "without attention", "ms", "20%..80%"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in (report.dense, *report.stages):
        table.add_row(
            row.name,
            str(row.steps),
            f"{row.macs_with_attention / 1e9:.4g}",
            f"{row.macs / 1e9:.4g}",
            f"{row.milliseconds:.2f}",
            f"{row.p20:.2f}..{row.p80:.2f}",
        )
    lines = [
        f"{name}: {human_count(count)} parameters, {human_bytes(size)} on disk"
        for name, (count, size) in sizes.items()
    ]
    console().print(
        table,
        *lines,
        f"speed-up {report.speedup:.3f}x, MACs {report.macs_ratio:.3f}x fewer "
        f"({report.macs_ratio_without_attention:.3f}x without attention products), "
        f"efficiency {report.efficiency:.3f}",
        sep="\n",
        highlight=False,
    )
