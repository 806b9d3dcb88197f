"""Run commands as a user would, and look at what they wrote."""

import json
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from mosaicdiff.cli import main


def run(*arguments) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def run_json(*arguments) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(message: str, *arguments) -> None:
    """Run what must end with exit code 2, a message, and nothing written at `--output`."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in result.stderr, result.stderr
    if "--output" in arguments:
        assert not Path(arguments[arguments.index("--output") + 1]).exists()


def weights_file(output: Path) -> Path:
    return output / "transformer" / "diffusion_pytorch_model.safetensors"


def stored(output: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: the weights, and the groups kept (`kept.*`)."""
    return load_file(weights_file(output))


def kept_counts(report: dict) -> list[dict[str, int]]:
    """Groups kept of each layer, by stage."""
    return [{row["name"]: row["kept"] for row in stage["layers"]} for stage in report["stages"]]
