"""`mosaicdiff generate`: pictures or videos from a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import (
    check_positive,
    device_option,
    dtype_option,
    examples,
    guarded,
    json_option,
    parse_pipeline_options,
    pick_device,
    pick_dtype,
    pipeline_config_option,
    pipeline_option,
    print_json,
    progress_bar,
    stage_memory_option,
)

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

#: Frames a second of a video's file: the models' own are from 16 to 25.
_FRAME_RATE = 16


@click.command(
    epilog=examples(
        "mosaicdiff generate out/digits-30 --classes 3,1,4 --output pictures.png",
        "mosaicdiff generate digits --guidance-scale 1.5 --steps 20 --output pictures/",
        "mosaicdiff generate out/sd3 --prompt 'a cat' --prompt 'a red house' --output pictures/ "
        "--pipeline-option height=512 --pipeline-option width=512",
        "mosaicdiff generate out/flux --prompt 'a cat' --lora style.safetensors --output cat.png",
    )
)
@click.argument("model")
@click.option("--classes", help="Labels, separated by commas.  [default: all ten digits]")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text, for models that are asked in words; repeatable, one picture each.",
)
@click.option("--steps", type=int, help="[default: 50; of --prompt the pipeline's own]")
@click.option(
    "--guidance-scale",
    type=float,
    help="1 is without guidance.  [default: 1; of --prompt the pipeline's own]",
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--lora",
    type=click.Path(path_type=Path),
    help="File of a LoRA for the dense model, of which a pruned one takes what it kept.",
)
@click.option("--lora-scale", type=float, help="Of all of the LoRA.  [default: 1.0]")
@pipeline_option("Of its call")
@pipeline_config_option
@stage_memory_option
@device_option
@dtype_option
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="A .png for one sheet (.gif for one video), or a folder for a file each.",
)
@json_option
@guarded
def generate(
    model: str,
    classes: str | None,
    prompts: tuple[str, ...],
    steps: int | None,
    guidance_scale: float | None,
    seed: int,
    lora: Path | None,
    lora_scale: float | None,
    pipeline_option: tuple[str, ...],
    pipeline_config: str | None,
    stage_memory: str,
    device: str,
    dtype: str,
    output: Path,
    as_json: bool,
) -> None:
    """Sample pictures from MODEL, dense or pruned: digits, a folder, a Hub id or a file."""
    if steps is not None:
        check_positive(steps=steps)
    labels = None if classes is None else _parse_classes(classes)
    if labels is not None and prompts:
        raise ValueError(
            f"--classes must be left out with --prompt, got {classes}: a model takes one of them."
        )
    more = parse_pipeline_options(pipeline_option)
    single = output.suffix.lower() in (".png", ".gif")
    if not single and output.is_file():
        raise ValueError(f"--output must be a .png, a .gif or a folder, got the file {output}.")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--output must lie in a folder that can be written to, got {output}.")
    if lora is not None and not lora.is_file():
        raise ValueError(f"--lora must be a .safetensors file, got {lora}, which is not there.")
    if lora is None and lora_scale is not None:
        raise ValueError(f"--lora-scale must be left out without --lora, got {lora_scale}.")
    if lora is not None and stage_memory == "swap":
        raise ValueError(
            "--stage-memory must be resident with --lora, got swap: a LoRA is added to all stages."
        )
    target = pick_device(device)
    from ..evaluate.sampling import draws_video, sample_images
    from ..sources import load_pipeline

    pipe = load_pipeline(model, pick_dtype(dtype, target), target, pipeline_config, stage_memory)
    if lora is not None:
        from ..composition.lora import load_lora

        load_lora(pipe, lora, scale=1.0 if lora_scale is None else lora_scale)
    conditions = _conditions(pipe, labels, prompts)
    _check_kind(output, draws_video(pipe), len(conditions))
    by_class = isinstance(conditions[0], int)
    if by_class:
        steps = 50 if steps is None else steps
        guidance_scale = 1.0 if guidance_scale is None else guidance_scale
    with progress_bar() as bar:
        task = bar.add_task("sample", total=len(conditions))
        images, seconds = sample_images(
            pipe,
            conditions,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            batch_size=64 if by_class else 1,  # models asked in words are large
            options=more,
            advance=lambda count: bar.advance(task, count),
        )
    (output.parent if single else output).mkdir(parents=True, exist_ok=True)
    sheets = [(output, images)]
    if not single:
        kind = "gif" if images.ndim == 5 else "png"
        names = [f"-class-{condition}" if by_class else "" for condition in conditions]
        sheets = [(output / f"{i:04d}{n}.{kind}", images[i : i + 1]) for i, n in enumerate(names)]
    for file, sheet in sheets:
        _write(sheet, file)
    files = [str(file) for file, _ in sheets]
    if as_json:
        asked = {"classes" if by_class else "prompts": conditions}
        print_json({"files": files, **asked, "seconds": seconds, "seed": seed})
        return
    click.echo(f"{len(conditions)} pictures in {seconds:.1f} s: {output}")


def _check_kind(output: Path, video: bool, count: int) -> None:
    """Refuse a file that cannot hold what is drawn.

    Raises:
        ValueError: it is of the other kind, or one file for several videos.
    """
    kind = output.suffix.lower()
    if kind == (".png" if video else ".gif"):
        raise ValueError(
            f"--output must be a {'.gif' if video else '.png'} or a folder for a model that draws "
            f"{'videos' if video else 'pictures'}, got {output}."
        )
    if kind == ".gif" and count > 1:
        raise ValueError(f"--output must be a folder for {count} videos, got {output}.")


def _write(sheet: torch.Tensor, file: Path) -> None:
    """Write pictures (N, C, H, W) on one sheet, or a video (1, F, C, H, W)."""
    from PIL import Image

    from .plots import picture_grid

    def picture(images: torch.Tensor) -> Image.Image:
        columns = min(10, len(images))
        return Image.fromarray(picture_grid(images, columns=columns, scale=1).squeeze())

    if sheet.ndim == 4:
        picture(sheet).save(file)
        return
    first, *rest = [picture(frame[None]) for frame in sheet[0]]
    first.save(file, save_all=True, append_images=rest, duration=1000 // _FRAME_RATE, loop=0)


def _conditions(
    pipe: DiffusionPipeline, labels: list[int] | None, prompts: tuple[str, ...]
) -> list[int] | list[str]:
    """Return what a pipeline is sampled with; refuse what is meant for the other kind."""
    from ..sources import class_count
    from ..statistics.prompts import find_condition

    name = type(pipe).__name__
    if find_condition(type(pipe).__call__) == "prompt":
        if labels is not None:
            raise ValueError(
                f"--classes must be left out for {name}, which is asked in words, got "
                f"{','.join(map(str, labels))}. Use --prompt."
            )
        if not prompts:
            raise ValueError(
                f"--prompt must be given for {name}, which is asked in words, got none. "
                "Say what is wanted: --prompt 'a cat'."
            )
        return list(prompts)
    if prompts:
        raise ValueError(
            f"--prompt must be left out for {name}, which takes no text, got {prompts[0]!r}. "
            "Use --classes."
        )
    known = class_count(pipe)
    chosen = list(range(10)) if labels is None else labels
    if any(not 0 <= label < known for label in chosen):
        raise ValueError(f"--classes must be in 0..{known - 1}, got {','.join(map(str, chosen))}.")
    return chosen


def _parse_classes(classes: str) -> list[int]:
    try:
        return [int(part) for part in classes.split(",")]
    except ValueError:
        raise ValueError(
            f"--classes must be whole numbers separated by commas, got {classes!r}."
        ) from None
