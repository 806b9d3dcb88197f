"""`mosaicdiff generate`: pictures from a model."""

from __future__ import annotations

from pathlib import Path

import click

from .common import (
    check_positive,
    device_option,
    dtype_option,
    examples,
    guarded,
    json_option,
    pick_device,
    pick_dtype,
    print_json,
    progress_bar,
)


@click.command(
    epilog=examples(
        "mosaicdiff generate out/digits-30 --classes 3,1,4 --output pictures.png",
        "mosaicdiff generate digits --guidance-scale 1.5 --steps 20 --output pictures/",
    )
)
@click.argument("model")
@click.option("--classes", help="Labels, separated by commas.  [default: all ten digits]")
@click.option("--prompt", help="Text, for models that are asked in words.")
@click.option("--steps", default=50, show_default=True)
@click.option("--guidance-scale", default=1.0, show_default=True, help="1 is without guidance.")
@click.option("--seed", default=0, show_default=True)
@device_option
@dtype_option
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="A .png for one sheet, or a folder for a file a picture.",
)
@json_option
@guarded
def generate(
    model: str,
    classes: str | None,
    prompt: str | None,
    steps: int,
    guidance_scale: float,
    seed: int,
    device: str,
    dtype: str,
    output: Path,
    as_json: bool,
) -> None:
    """Sample pictures from MODEL, dense or pruned: digits, a folder or a Hub id."""
    check_positive(steps=steps)
    labels = _parse_classes(classes, prompt)
    single = output.suffix.lower() == ".png"
    if not single and output.is_file():
        raise ValueError(f"--output must be a .png file or a folder, got the file {output}.")
    target = pick_device(device)
    from PIL import Image

    from ..evaluate.sampling import sample_images
    from ..sources import class_count, load_pipeline
    from .plots import picture_grid

    pipe = load_pipeline(model, pick_dtype(dtype, target), target)
    known = class_count(pipe)
    if any(not 0 <= label < known for label in labels):
        raise ValueError(f"--classes must be in 0..{known - 1}, got {classes}.")
    (output.parent if single else output).mkdir(parents=True, exist_ok=True)
    with progress_bar() as bar:
        task = bar.add_task("sample", total=len(labels))
        images, seconds = sample_images(
            pipe,
            labels,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            advance=lambda count: bar.advance(task, count),
        )
    files = []
    sheets = (
        [("", images)]
        if single
        else [(f"{i:04d}-class-{label}.png", images[i : i + 1]) for i, label in enumerate(labels)]
    )
    for name, sheet in sheets:
        file = output / name if name else output
        Image.fromarray(picture_grid(sheet, columns=min(10, len(sheet)), scale=1).squeeze()).save(
            file
        )
        files.append(str(file))
    if as_json:
        print_json({"files": files, "classes": labels, "seconds": seconds, "seed": seed})
        return
    click.echo(f"{len(labels)} pictures in {seconds:.1f} s: {output}")


def _parse_classes(classes: str | None, prompt: str | None) -> list[int]:
    if prompt is not None:
        raise ValueError(
            "--prompt needs a text-conditional model; the models of this version take --classes."
        )
    if classes is None:
        return list(range(10))
    try:
        return [int(part) for part in classes.split(",")]
    except ValueError:
        raise ValueError(
            f"--classes must be whole numbers separated by commas, got {classes!r}."
        ) from None
