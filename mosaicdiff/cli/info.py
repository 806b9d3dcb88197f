"""`mosaicdiff info`: what a pruned folder or file holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import console, examples, guarded, human_bytes, human_count, json_option, print_json

if TYPE_CHECKING:
    from ..memory.count import StatedMemory


@click.command(epilog=examples("mosaicdiff info out/digits-30", "mosaicdiff info out/dit --json"))
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
@guarded
def info(folder: Path, as_json: bool) -> None:
    """Print the stages and layers of a pruned FOLDER or single file, and what it takes in memory.

    Memory is counted from the shapes in a folder's weights file; no weights are loaded.
    """
    import json

    from ..checkpoint import REPORT
    from ..checkpoint_load import read_config
    from ..report import report_from_dict

    if folder.suffix == ".safetensors" and folder.is_file():
        from ..single_file import read_plan

        plan = read_plan(folder)
        place, config, report = folder, plan["checkpoint"], plan["report"] or None
    elif folder.is_dir():
        inner = [folder / name for name in ("transformer", "unet") if (folder / name).is_dir()]
        place = inner[0] if inner else folder
        config = read_config(place)
        file = place / REPORT
        report = json.loads(file.read_text()) if file.is_file() else None
    else:
        raise ValueError(
            f"info: {folder} must be the folder or .safetensors of a pruned model, but there is "
            "none. Of dense models mosaicdiff families tells."
        )
    memory = None
    if place.is_dir():
        from ..memory.count import state_folder

        memory = state_folder(place)
    if as_json:
        stated = None if memory is None else memory.to_dict()
        print_json({"config": config, "report": report, "memory": stated})
        return
    out = console()
    out.print(
        f"{place}: {config['base']['class']} in {len(config['stages'])} stages, "
        f"pruned from {config['source'] or 'an unnamed model'}, format {config['format_version']}",
        highlight=False,
    )
    if memory is not None:
        out.print(_memory_line(memory), highlight=False)
    if report is None:
        out.print("no report.json: it was saved without one", highlight=False)
        return
    values = report_from_dict(report)
    out.print(*values.tables())
    if values.decision is not None:
        out.print(
            f"{values.decision.allocation} allocation, {values.decision.budget} asked",
            highlight=False,
        )
    out.print(
        f"sparsity {values.sparsity:.2%}; MACs a call "
        f"{human_count(values.macs_dense_with_attention)} -> "
        f"{human_count(values.macs_with_attention)}",
        highlight=False,
    )


def _memory_line(memory: StatedMemory) -> str:
    """Say what each mode takes, as a multiple of the dense denoiser without its copies."""
    ratios = memory.ratios()

    def part(name: str) -> str:
        return f"{human_bytes(getattr(memory, name))} ({ratios[name]:.2f}x)"

    copies = memory.dense - memory.dense_distinct
    besides = f", and {human_bytes(copies)} of copies that it is published with" if copies else ""
    return "\n".join(
        (
            f"dense            {human_bytes(memory.dense_distinct)} (1x){besides}",
            f"on disk          {part('disk')}",
            f"stages resident  {part('resident')} on the device",
            f"stages swapped   {part('swap_device')} on the device, {part('swap_host')} in the "
            "host's memory (--stage-memory swap)",
        )
    )
