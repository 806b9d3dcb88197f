"""`mosaicdiff evaluate`: dense beside pruned, at the same seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import (
    console,
    examples,
    guarded,
    human_bytes,
    human_count,
    json_option,
    print_json,
)
from .judging import judge_model, with_options

if TYPE_CHECKING:
    from ..evaluate import Evaluation, Metric, Row


@click.command(
    epilog=examples(
        "mosaicdiff evaluate out/digits-30",
        "mosaicdiff evaluate out/digits-30 --num-images 2000 --guidance-scale 1,1.5,2,4 --json",
        "mosaicdiff evaluate out/sd3 --prompts prompts.txt --image-size 512 "
        "--clip-score openai/clip-vit-large-patch14",
        "mosaicdiff evaluate out/dit --features inception --reference imagenet256.npz",
        "mosaicdiff evaluate out/digits-30 --grid both.png",
    )
)
@click.argument("model")
@with_options
@click.option("--grid", type=click.Path(path_type=Path), help="Draw both sample grids here.")
@json_option
@guarded
def evaluate(model: str, grid: Path | None, as_json: bool, **options: Any) -> None:
    """Sample MODEL and its dense one with the same noise, and judge both.

    Prints parameters, bytes, MACs and time, and how far the pictures are from the dense ones
    (squared error, PSNR, SSIM). In the features of a network (--features) also the Frechet
    distance to real pictures, precision and recall, and the Inception score; for the embedded
    digits the share of pictures that a classifier reads as asked.

    Several --guidance-scale are a sweep: both models at each, and each at its own best. The
    Frechet distance is biased upwards for few pictures, precision and recall depend on how many
    there are: compare them only at one --num-images.
    """
    from .plots import check_plot_file

    if grid is not None:
        check_plot_file(grid, "--grid")
    result = judge_model(model, options)
    if grid is not None:
        _draw(grid, result)
    if as_json:
        against = result.setting.models["dense"]
        print_json(
            result.to_dict() | {"model": model, "against": against, "grid": grid and str(grid)}
        )
        return
    print_evaluation(result)
    if grid is not None:
        click.echo(f"wrote {grid}")


def _draw(path: Path, result: Evaluation) -> None:
    """Draw both models' pictures, each at its best guidance; of videos the first frames."""
    from .plots import write_comparison_grid

    images, titles = {}, {}
    for row in result.best_pair or result.pairs[0]:
        found = result.images[row.model, row.guidance_scale]
        images[row.model] = found[:, 0] if found.ndim == 5 else found
        titles[row.model] = _title(row, swept=len(result.setting.guidance_scales) > 1)
    write_comparison_grid(path, images, titles)


def _title(row: Row, swept: bool) -> str:
    said = [f"guidance {_scale(row)}"] if swept else []
    if "frechet" in row.metrics:
        said.append(f"Frechet distance {row.metrics['frechet']:.2f}")
    return f"{row.model} ({', '.join(said)})" if said else row.model


def _scale(row: Row) -> str:
    return "the pipeline's own" if row.guidance_scale is None else f"{row.guidance_scale:g}"


def print_evaluation(result: Evaluation) -> None:
    """Print an evaluation as tables for people."""
    setting = result.setting
    steps = "the pipeline's" if setting.steps is None else str(setting.steps)
    title = f"{setting.num_images} images, {steps} steps, seed {setting.seed}"
    if len(setting.guidance_scales) == 1:
        _print_pair(result, f"{title}, guidance {_scale(result.rows[0])}")
    else:
        _print_sweep(result, title)
    for note in result.notes:
        console().print(f"[dim]{note}[/dim]", highlight=False)


def _print_pair(result: Evaluation, title: str) -> None:
    from rich.table import Table

    dense, pruned = result.pairs[0]
    ratio = result.ratio(dense, pruned)
    table = Table(title=title)
    table.add_column("")
    for column in ("dense", "pruned", "ratio"):
        table.add_column(column, justify="right")
    table.add_row(
        "MACs an image",
        human_count(dense.macs_with_attention_per_image),
        human_count(pruned.macs_with_attention_per_image),
        f"{ratio.macs_with_attention:.2f}x fewer",
    )
    table.add_row(
        "  without attention products",
        human_count(dense.macs_per_image),
        human_count(pruned.macs_per_image),
        f"{ratio.macs:.2f}x fewer",
    )
    table.add_row(
        "time an image",
        f"{1e3 * dense.seconds_per_image:.1f} ms",
        f"{1e3 * pruned.seconds_per_image:.1f} ms",
        f"{ratio.speedup:.2f}x as fast",
    )
    table.add_row(
        "parameters",
        human_count(dense.parameters),
        human_count(pruned.parameters),
        f"{1 / ratio.parameters:.2f}x, all stages",
    )
    table.add_row("bytes on disk", human_bytes(dense.bytes), human_bytes(pruned.bytes), "")
    for metric in result.metrics:
        table.add_row(metric.title, _value(metric, dense), _value(metric, pruned), "")
    console().print(table)


def _print_sweep(result: Evaluation, title: str) -> None:
    from rich.table import Table

    own = [metric for metric in result.metrics if metric.about != "dense"]
    table = Table(title=f"{title}; * best of its model")
    for column in ("guidance", "model"):
        table.add_column(column)
    for column in ("MACs", "ms", *(metric.title for metric in own)):
        table.add_column(column, justify="right")
    for row in result.rows:
        table.add_row(
            _scale(row),
            row.model,
            human_count(row.macs_with_attention_per_image),
            f"{1e3 * row.seconds_per_image:.1f}",
            *(_starred(metric, row) for metric in own),
            end_section=row.model == "pruned",
        )
    console().print(table)
    paired = [metric for metric in result.metrics if metric.about == "dense"]
    beside = Table(title="pruned beside the dense pictures of the same guidance")
    beside.add_column("guidance")
    for metric in paired:
        beside.add_column(metric.title, justify="right")
    for _, row in result.pairs:
        beside.add_row(_scale(row), *(_starred(metric, row) for metric in paired))
    console().print(beside)
    if result.best_pair is None or result.best_by is None:
        return
    dense, pruned = result.best_pair
    ratio, metric = result.ratio(dense, pruned), result.metric(result.best_by)
    console().print(
        f"Each at its best {metric.title}: dense {_value(metric, dense)} at {_scale(dense)}, "
        f"pruned {_value(metric, pruned)} at {_scale(pruned)}; {ratio.speedup:.2f}x as fast, "
        f"{ratio.macs_with_attention:.2f}x fewer MACs.",
        highlight=False,
    )


def _starred(metric: Metric, row: Row) -> str:
    return _value(metric, row) + ("*" if metric.name in row.best_by else "")


def _value(metric: Metric, row: Row) -> str:
    value = row.metrics.get(metric.name)
    if value is None:
        return "-"
    return f"{value:.1%}" if metric.percent else f"{value:.4g}"
