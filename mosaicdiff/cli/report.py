"""`mosaicdiff report`: all that is known of a pruned model, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import (
    check_positive,
    examples,
    guarded,
    human_bytes,
    json_option,
    print_json,
)
from .judging import command_line, judge_model, with_options

if TYPE_CHECKING:
    from ..page import Network


@click.command(
    epilog=examples(
        "mosaicdiff report out/digits-30 --output report.html",
        "mosaicdiff report out/digits-30 --output report.html --guidance-scale 1,1.5,2,3",
        "mosaicdiff bench out/digits-30 --json > bench.json",
        "mosaicdiff report out/digits-30 --output report.html --bench bench.json",
        "mosaicdiff report out/sd3 --output report.html --prompts prompts.txt --num-images 24",
    )
)
@click.argument("model")
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The page, ending in .html; it is replaced if it is there.",
)
@click.option(
    "--bench",
    type=click.Path(path_type=Path),
    help="What `mosaicdiff bench --json` printed, to be shown too.",
)
@click.option(
    "--pictures",
    default=48,
    show_default=True,
    help="Of each model at each guidance to show, at most; large ones are fewer.",
)
@with_options
@json_option
@guarded
def report(
    model: str,
    output: Path,
    bench: Path | None,
    pictures: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Judge MODEL beside its dense one, as `evaluate` does, and write a page about it.

    The page is one file that opens from disk and loads nothing: pictures of both models to be
    looked at side by side, through a slider or by flipping; quality and cost as tables; the
    stages and the score they come from; kept heads and neurons of each block; errors of the
    layers; and the command and versions to make it again.
    """
    check_positive(pictures=pictures)
    check_output(output)
    from ..page import make_page, read_bench, read_networks, write_page

    timed = None if bench is None else read_bench(bench)
    networks: list[Network] = []
    result = judge_model(
        model, options, look=lambda pruned: networks.extend(read_networks(pruned, model))
    )
    page = make_page(
        model, networks, result, command=command_line(), bench=timed, pictures=pictures
    )
    size = write_page(page, output)
    if as_json:
        print_json(result.to_dict() | {"model": model, "output": str(output), "bytes": size})
        return
    click.echo(f"wrote {output}, {human_bytes(size)}: open it in a browser")


def check_output(path: Path) -> None:
    """Refuse a page that could not be written, before the long run.

    Raises:
        ValueError: its ending is another, it is a folder, or its folder is missing.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"report: --output must end in .html, got {path}.")
    if path.is_dir():
        raise ValueError(f"report: --output must be a file, but {path} is a folder.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"report: --output must lie in a folder that exists, got {path}.")
