"""`mosaicdiff evaluate`: dense beside pruned, at the same seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
    print_json,
    progress_bar,
)

if TYPE_CHECKING:
    from ..evaluate import Comparison


@click.command(
    epilog=examples(
        "mosaicdiff evaluate out/digits-30",
        "mosaicdiff evaluate out/digits-30 --num-images 2000 --guidance-scale 1.5 --json",
        "mosaicdiff evaluate out/digits-30 --grid both.png",
    )
)
@click.argument("model")
@click.option("--against", help="The dense model.  [default: the one it was pruned from]")
@click.option("--num-images", default=200, show_default=True)
@click.option("--guidance-scale", default=1.0, show_default=True, help="1 is without guidance.")
@click.option("--steps", default=50, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", default=100, show_default=True)
@click.option("--grid", type=click.Path(path_type=Path), help="Draw both sample grids here.")
@device_option
@dtype_option
@json_option
@guarded
def evaluate(
    model: str,
    against: str | None,
    num_images: int,
    guidance_scale: float,
    steps: int,
    seed: int,
    batch_size: int,
    grid: Path | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Sample a class-conditional MODEL and its dense one with the same noise, and judge both.

    Prints parameters, bytes, MACs and time, and the mean squared difference of the pictures. For
    the embedded digits also the share of pictures that a classifier reads as asked, and the
    Frechet distance to the data set in its features. That distance is biased upwards for few
    pictures: compare it only at one --num-images.
    """
    check_positive(num_images=num_images, steps=steps, batch_size=batch_size)
    if num_images < 2:
        raise ValueError(f"--num-images must be at least 2, got {num_images}.")
    target = pick_device(device)
    number = pick_dtype(dtype, target)
    from ..evaluate import DigitsJudge, compare
    from ..runtime import StagedDenoiser
    from ..sources import DIGITS, class_count, find_denoiser, load_pipeline, source_name
    from ..statistics.prompts import find_condition
    from .plots import check_plot_file, write_comparison_grid

    if grid is not None:
        check_plot_file(grid)
    pruned = load_pipeline(model, number, target)
    if find_condition(type(pruned).__call__) != "class_labels":
        raise ValueError(
            f"evaluate: model must be class-conditional, got {model}, a {type(pruned).__name__}: "
            "both models are sampled class by class. Look at what `mosaicdiff generate --prompt` "
            "makes of both at one --seed, and at `mosaicdiff bench` for the time."
        )
    _, denoiser = find_denoiser(pruned)
    if against is None:
        against = denoiser.info.source if isinstance(denoiser, StagedDenoiser) else None
        if against is None:
            raise ValueError(
                f"evaluate: --against must name the dense model: {model} does not say where it "
                "came from."
            )
    dense = load_pipeline(against, number, target)
    is_digits = source_name(dense) == DIGITS
    with progress_bar() as bar:
        task = bar.add_task("sample both", total=2 * num_images)
        result = compare(
            dense,
            pruned,
            judge=DigitsJudge() if is_digits else None,
            classes=class_count(dense),
            num_images=num_images,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            batch_size=batch_size,
            advance=lambda count: bar.advance(task, count),
        )
    if grid is not None:
        rows = {row.name: row for row in result.rows}
        titles = {name: _title(name, rows[name].frechet) for name in result.images}
        write_comparison_grid(grid, result.images, titles)
    if as_json:
        print_json(
            result.to_dict() | {"model": model, "against": against, "grid": grid and str(grid)}
        )
        return
    _print_comparison(result)
    if grid is not None:
        click.echo(f"wrote {grid}")


def _title(name: str, frechet: float | None) -> str:
    return name if frechet is None else f"{name} (Frechet distance {frechet:.2f})"


def _print_comparison(result: Comparison) -> None:
    from rich.table import Table

    dense, pruned = result.rows
    table = Table(
        title=f"{result.num_images} images, {result.steps} steps, guidance "
        f"{result.guidance_scale:g}, seed {result.seed}"
    )
    table.add_column("")
    for column in ("dense", "pruned", "ratio"):
        table.add_column(column, justify="right")
    table.add_row(
        "MACs an image",
        human_count(dense.macs_per_image),
        human_count(pruned.macs_per_image),
        f"{result.macs_ratio:.2f}x fewer",
    )
    table.add_row(
        "time an image",
        f"{1e3 * dense.seconds_per_image:.1f} ms",
        f"{1e3 * pruned.seconds_per_image:.1f} ms",
        f"{result.speedup:.2f}x faster",
    )
    table.add_row(
        "parameters",
        human_count(dense.parameters),
        human_count(pruned.parameters),
        f"{pruned.parameters / dense.parameters:.2f}x, all stages",
    )
    table.add_row("bytes on disk", human_bytes(dense.bytes), human_bytes(pruned.bytes), "")
    if dense.frechet is not None and pruned.frechet is not None:
        table.add_row("conditional accuracy", f"{dense.accuracy:.2%}", f"{pruned.accuracy:.2%}", "")
        table.add_row(
            "Frechet distance",
            f"{dense.frechet:.2f}",
            f"{pruned.frechet:.2f}",
            f"of {result.num_images}",
        )
    table.add_row("squared error to dense", "-", f"{pruned.mse_to_dense:.4f}", "")
    console().print(table)
