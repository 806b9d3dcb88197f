"""The `mosaicdiff` command. Each sub-command is one file; heavy imports wait for their call."""

from __future__ import annotations

import click

from .bench import bench
from .calibrate import calibrate
from .doctor import doctor
from .evaluate import evaluate
from .families import families
from .generate import generate
from .info import info
from .prune import prune
from .report import report
from .stages import stages
from .sweep import sweep


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Try: mosaicdiff prune digits --output out/digits-30",
)
@click.version_option(package_name="mosaicdiff")
def main() -> None:
    """Prune diffusion models stage by stage, without retraining, and sample them faster."""


for _command in (
    stages,
    calibrate,
    prune,
    sweep,
    generate,
    evaluate,
    report,
    bench,
    info,
    families,
    doctor,
):
    main.add_command(_command)

__all__ = ["main"]
