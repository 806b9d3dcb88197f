"""What the commands share: options, messages, progress, output."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..quantities import human_bytes as human_bytes
from ..quantities import human_count as human_count

if TYPE_CHECKING:
    import torch

    from ..inputs.prompt_files import PromptFile

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: float32 on a CPU, bfloat16 on a GPU.",
)
pipeline_config_option = click.option(
    "--pipeline-config",
    help="Of a single file: folder or Hub id of its pipeline in diffusers' layout.",
)
stage_memory_option = click.option(
    "--stage-memory",
    type=click.Choice(("resident", "swap")),
    default="resident",
    show_default=True,
    help="Of a pruned model: all stages on the device, or one at a time, for small cards.",
)


def pipeline_option(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the option that hands arguments to the pipeline's call."""
    return click.option(
        "--pipeline-option",
        multiple=True,
        help=f"{what}, NAME=VALUE in JSON, e.g. height=512; repeatable.",
    )


def examples(*lines: str) -> str:
    """Format an epilog of example calls."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """End with exit 2 on bad input and 1 on failure, each with its message and no traceback."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            _fail(str(error), 2, kwargs.get("as_json", False))
        except (RuntimeError, OSError) as error:
            _fail(str(error), 1, kwargs.get("as_json", False))
        except Exception as error:
            if not hasattr(error, "batch"):  # then it is ours, and its traceback is wanted
                raise
            # What the user's pipeline raises may be of any kind.
            _fail(str(error), 1, kwargs.get("as_json", False))

    return call


def _fail(message: str, code: int, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"error": message}))
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def pick_device(name: str) -> torch.device:
    """Resolve `auto` and refuse a device that is not there.

    Raises:
        ValueError: no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device must be available, got {name!r} without a CUDA device. Use --device cpu."
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve `auto` by device."""
    import torch

    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def check_positive(**values: int) -> None:
    """Refuse counts below 1.

    Raises:
        ValueError: names the option.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")


def check_calibration(source: str | None) -> None:
    """Refuse a calibration source that is not there, before a model is loaded.

    Raises:
        ValueError: there is no such file or folder.
    """
    if source is not None and not Path(source).exists():
        raise ValueError(f"calibration: {source} must be a folder or a file, but there is none.")


def prompt_source(options: Mapping[str, Any]) -> PromptFile | None:
    """Return the file of prompts that the options name, and refuse one that is not there.

    Raises:
        ValueError: there is no such file, or a column is named without one.
    """
    from ..inputs.prompt_files import PromptFile, check_prompt_file

    path, column = options["prompts"], options["prompt_column"]
    if path is None:
        if column is not None:
            raise ValueError(f"--prompt-column must be left out without --prompts, got {column!r}.")
        return None
    source = PromptFile(path, column)
    check_prompt_file(source)
    return source


def parse_pipeline_options(texts: Sequence[str]) -> dict[str, Any]:
    """Read arguments of a pipeline's call.

    Raises:
        ValueError: one is no NAME=VALUE in JSON.
    """
    return dict(map(_parse_pipeline_option, texts))


def _parse_pipeline_option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        if name.strip():
            return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        pass
    raise ValueError(
        "--pipeline-option must be NAME=VALUE with a value in JSON (texts in quotes), e.g. "
        f"height=512 or 'negative_prompt=\"blurry\"', got {text!r}."
    )


def console() -> Console:
    """Return the console for tables; wide enough to keep rows whole when piped."""
    return Console() if sys.stdout.isatty() else Console(width=110)


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """Show a progress bar on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        yield progress


@contextmanager
def told_progress(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar, and yield what the engine tells its progress to."""
    with progress_bar(quiet) as bar:
        task = bar.add_task("prepare", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield tell


def print_json(values: Any) -> None:
    """Print plain values as JSON; numbers that JSON lacks become null."""
    click.echo(json.dumps(_plain(values), indent=2))


def _plain(values: Any) -> Any:
    if isinstance(values, dict):
        return {str(key): _plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_plain(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values
