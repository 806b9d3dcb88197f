"""Read a pruned single file."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..adapters import adapter_for_class
from ..checkpoint_load import assemble, cast, check_config
from ..runtime import StagedDenoiser
from .plan import read_plan, unpack_kept


def load_single_file(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> StagedDenoiser:
    """Read the denoiser of a file that `save_single_file` wrote.

    Args:
        path: the `.safetensors`; nothing else is needed, its metadata hold the configuration.
        dtype: of the weights.
        device: where they go.

    Raises:
        ValueError: the file was not written by `save_single_file`, or not all of it is there.
    """
    plan = read_plan(path)
    config = check_config(plan["checkpoint"], Path(path))
    adapter = adapter_for_class(config["base"]["class"])
    tensors = cast(_stored(Path(path), plan, device), dtype, adapter)
    tensors |= {name: unpack_kept(packed) for name, packed in plan["kept"].items()}
    return assemble(config, tensors, plan["report"], torch.device(device))


def _stored(
    path: Path, plan: dict[str, Any], device: str | torch.device
) -> dict[str, torch.Tensor]:
    """Take the tensors of a checkpoint out of those of a file."""
    held = load_file(path, device=str(device))
    found: dict[str, list[tuple[int, int, torch.Tensor]]] = defaultdict(list)
    for name, made_of in plan["tensors"].items():
        if name not in held:
            raise ValueError(f"load_single_file: {path} must hold {name}, but it does not.")
        if isinstance(made_of, str):
            found[made_of].append((0, 0, held[name]))
            continue
        axis, parts = (0, made_of) if isinstance(made_of, list) else (
            made_of["axis"], made_of["parts"]
        )  # fmt: skip
        lengths = [length for _, _, length in parts]
        if sum(lengths) != held[name].shape[axis]:
            raise ValueError(
                f"load_single_file: {name} must have {sum(lengths)} rows or columns along axis "
                f"{axis}, got {held[name].shape[axis]} in {path}."
            )
        split = held[name].split(lengths, axis)
        for (stored, start, _), part in zip(parts, split, strict=True):
            found[stored].append((start, axis, part))
    return {stored: _joined(parts) for stored, parts in found.items()}


def _joined(parts: list[tuple[int, int, torch.Tensor]]) -> torch.Tensor:
    parts = sorted(parts, key=lambda part: part[0])
    if len(parts) == 1:
        return parts[0][2].contiguous()
    return torch.cat([part for _, _, part in parts], parts[0][1])
