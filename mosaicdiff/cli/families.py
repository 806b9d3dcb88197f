"""`mosaicdiff families`: what can be pruned, of every family or of one model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .common import (
    console,
    examples,
    guarded,
    human_count,
    json_option,
    pipeline_config_option,
    print_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..families import Family, ModelView


@click.command(
    epilog=examples(
        "mosaicdiff families",
        "mosaicdiff families digits",
        "mosaicdiff families ./sdxl --json",
        "mosaicdiff families flux.safetensors --pipeline-config ./flux",
    )
)
@click.argument("model", required=False)
@pipeline_config_option
@json_option
@guarded
def families(model: str | None, pipeline_config: str | None, as_json: bool) -> None:
    """List the families that can be pruned; of MODEL, what could go and what stays, and why.

    MODEL is digits, a folder of a pipeline or a denoiser, a Hub id or a single file. Only
    configurations are read, no weights.
    """
    from dataclasses import asdict

    from ..families import empty_model, view_model
    from ..families import families as supported

    if model is None:
        if pipeline_config is not None:
            raise ValueError("--pipeline-config must be left out without MODEL.")
        rows = supported()
        if as_json:
            print_json({"families": [asdict(row) for row in rows]})
            return
        _print_families(console(), rows)
        return
    view = view_model(empty_model(model, pipeline_config))
    if as_json:
        print_json({"model": model} | view.to_dict())
        return
    _print_model(console(), model, view)


def _print_families(out: Console, rows: tuple[Family, ...]) -> None:
    from rich.table import Table

    table = Table(title="families", show_lines=True)
    table.add_column("denoiser and its pipelines", no_wrap=True)
    for column in ("what goes", "q/k norms", "what stays"):
        table.add_column(column)
    for row in rows:
        stays = list(dict.fromkeys(why.partition(":")[0] for _, why in row.stays))
        stays += ["first and last block, unless --prune-ends"] if row.whole_ends else []
        table.add_row(
            "\n".join((row.denoiser, *(f"  {name}" for name in row.pipelines))),
            row.goes, row.norms, "; ".join(stays),
        )  # fmt: skip
    out.print(table)
    out.print("Of one model, with shares and reasons: mosaicdiff families MODEL", highlight=False)


def _print_model(out: Console, model: str, view: ModelView) -> None:
    from rich.table import Table

    if view.obstacle is not None:
        out.print(f"{model}: {view.denoiser} cannot be pruned.", highlight=False, soft_wrap=True)
        out.print(view.obstacle, highlight=False, markup=False, soft_wrap=True)
        if view.found:
            counts = ", ".join(f"{count} {name}" for name, count in view.found.items())
            out.print(f"A declaration would name: {counts}.", highlight=False, soft_wrap=True)
        return
    out.print(
        f"{model}: {view.denoiser}, {human_count(view.parameters)} parameters, "
        f"{human_count(view.macs)} MACs a call",
        highlight=False,
    )
    table = Table(title="what could go")
    table.add_column("layers")
    for column in ("number", "of each", "in all", "of MACs", "of parameters"):
        table.add_column(column, justify="right")
    for row in view.goes:
        few, many = row.groups
        each = f"{few}" if few == many else f"{few}-{many}"
        table.add_row(
            row.name, str(row.layers), f"{each} {row.kind}", str(row.removable),
            f"{row.macs_share:.1%}", f"{row.parameters_share:.1%}",
        )  # fmt: skip
    goes = sum(row.macs_share for row in view.goes), sum(row.parameters_share for row in view.goes)
    table.add_row("together", "", "", "", f"{goes[0]:.1%}", f"{goes[1]:.1%}")
    out.print(table)
    table = Table(title="what stays")
    table.add_column("modules")
    table.add_column("of parameters", justify="right")
    table.add_column("why")
    for part in view.stays:
        table.add_row(part.name, f"{part.share:.1%}", part.why)
    out.print(table)
    if view.whole_ends:
        out.print(
            f"{' and '.join(view.whole_ends)} stay whole too unless --prune-ends is given.",
            highlight=False,
        )
