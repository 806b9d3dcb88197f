"""`mosaicdiff doctor`: versions, devices, and which kernels are in use."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from .common import console, examples, guarded, json_option, print_json

_PACKAGES = ("mosaicdiff", "torch", "triton", "diffusers", "safetensors", "numpy", "accelerate")


@click.command(epilog=examples("mosaicdiff doctor", "mosaicdiff doctor --json"))
@json_option
@guarded
def doctor(as_json: bool) -> None:
    """Print versions, devices, which kernels are in use, and why not the others."""
    import torch

    import mosaic_kernels

    values: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu_threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "kernels": mosaic_kernels.backends(),
    }
    if as_json:
        print_json(values)
        return
    out = console()
    out.print(f"python {values['python']} on {values['platform']}", highlight=False)
    for name, found in values["packages"].items():
        out.print(f"  {name} {found or 'is not installed'}", highlight=False)
    devices = ", ".join(values["cuda_devices"]) or "none"
    out.print(f"CUDA devices: {devices}; CPU threads: {values['cpu_threads']}", highlight=False)
    _print_nested(out, values["kernels"])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _print_nested(out: Any, values: dict[str, Any], depth: int = 0) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            out.print(f"{'  ' * depth}{key}:", highlight=False)
            _print_nested(out, value, depth + 1)
        elif value is not None:
            out.print(f"{'  ' * depth}{key}: {value}", highlight=False, markup=False)
