"""Save a staged denoiser. The format is described in docs/checkpoint-format.md."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import nn

from .files import current_umask, whole_folder, write_text
from .groups import Piece, PrunableLayer
from .masked_storage import masked_parameters, store_masked
from .pack import LeadingColumns, StandIn
from .runtime import StagedDenoiser
from .stage_state import StageInfo
from .surgery import Surgeon

FORMAT_VERSION = 3
CONFIG = "config.json"
REPORT = "report.json"


def weights_name(variant: str | None = None) -> str:
    """Return the name of the weights file, as diffusers builds it."""
    infix = f".{variant}" if variant else ""
    return f"diffusion_pytorch_model{infix}.safetensors"


def save(staged: StagedDenoiser, folder: Path, variant: str | None = None) -> None:
    """Write a staged denoiser: a new folder appears whole, an existing one file by file."""
    if folder.is_dir():
        _write(staged, folder, variant)
    else:
        with whole_folder(folder) as temporary:
            _write(staged, temporary, variant)


def _write(staged: StagedDenoiser, folder: Path, variant: str | None) -> None:
    tensors, storage, aliases = storage_of(staged)
    weights = folder / weights_name(variant)
    partial = weights.with_name(weights.name + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o666 & ~current_umask())  # safetensors makes it readable to its owner alone
    partial.replace(weights)
    info = staged.info
    if info.report:
        write_text(folder / REPORT, json.dumps(info.report, indent=2) + "\n")
    config = config_of(staged, storage, aliases)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def config_of(
    staged: StagedDenoiser, storage: dict[str, str], aliases: dict[str, str]
) -> dict[str, Any]:
    """Make the configuration of a checkpoint: everything but tensors; see `storage_of`."""
    info = staged.info
    return {
        "_class_name": "StagedDenoiser",
        "_diffusers_version": diffusers.__version__,
        "format_version": FORMAT_VERSION,
        "base": {"class": info.base_class, "config": info.base_config},
        "stages": [
            asdict(stage) | {"steps": steps}
            for stage, steps in zip(info.division.stages, info.steps, strict=True)
        ],
        "boundaries": list(info.division.boundaries),
        "timesteps": {"naming": info.division.naming, "total": info.division.total},
        "storage": storage,
        "aliases": aliases,
        "prune_config": info.prune_config,
        "source": info.source,
    }


def storage_of(
    staged: StagedDenoiser,
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, str]]:
    """Lay out the tensors of a checkpoint so that none is there twice.

    Returns:
        Tensors by stored name; for each parameter of a pruned layer `union` (one tensor over the
        groups that any stage keeps), `stage` (one for each stage) or `masked`; and names that
        stand for an earlier one's: of the last two, and of what is shared.

    Raises:
        ValueError: the stages no longer share what was not pruned, or a masked weight is not
            zero where it should be.
    """
    with staged.whole_stages():
        return _storage_of(staged)


def _storage_of(
    staged: StagedDenoiser,
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, str]]:
    stages, info = list(staged.stage_models), staged.info
    surgeon = Surgeon(staged.adapter, info.layers)
    masked = masked_parameters(info)
    tensors, aliases = _shared_tensors(stages, info.layers, masked)
    storage = store_masked(info, stages, tensors, aliases)
    for layer in info.layers:
        kept = [kept_groups(info, k, layer) for k in range(len(stages))]
        for k, groups in enumerate(kept):
            if len(groups) < layer.groups:
                tensors[f"kept.{k}.{layer.name}"] = groups.to(torch.int32)
        parts = [surgeon.parts(stage, layer, info.kept[k]) for k, stage in enumerate(stages)]
        for piece in layer.pieces:
            name = piece.name
            if piece.parameter in masked:
                continue
            held = [(k, part[name]) for k, part in enumerate(parts) if name in part]
            if not held:
                continue
            union = _union(layer, piece, held, kept)
            if union is not None:
                storage[name] = "union"
                tensors[f"union.{name}"] = union
                continue
            storage[name] = "stage"
            _store_apart(name, held, tensors, aliases)
    return tensors, storage, aliases


def _shared_tensors(
    stages: list[nn.Module], layers: tuple[PrunableLayer, ...], masked: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Collect what no layer's width and no mask touches; it must be one tensor in all stages.

    Returns:
        The tensors, and the names of parameters that are an earlier one's, of which they stand.
    """
    own = {piece.parameter for layer in layers for piece in layer.pieces} | set(masked)
    shared: dict[str, torch.Tensor] = {}
    for stage in stages:
        # What stands for a layer, or goes around its norm, holds the layer's own.
        ours = (LeadingColumns, StandIn)
        inside = tuple(f"{n}." for n, m in stage.named_modules() if isinstance(m, ours))
        for name, tensor in stage.state_dict(keep_vars=True).items():
            if name in own or name.startswith(inside):
                continue
            if tensor.data_ptr() != shared.setdefault(name, tensor).data_ptr():
                raise ValueError(
                    f"save_pretrained: {name} must be shared by all stages, but they hold "
                    "different tensors. Was a stage moved or trained alone?"
                )
    firsts: dict[int, str] = {}
    aliases = {
        f"shared.{name}": f"shared.{first}"
        for name, tensor in shared.items()
        if (first := firsts.setdefault(id(tensor), name)) != name
    }
    found = {f"shared.{n}": t.detach().contiguous() for n, t in shared.items()}
    return {name: t for name, t in found.items() if name not in aliases}, aliases


def kept_groups(info: StageInfo, stage: int, layer: PrunableLayer) -> torch.Tensor:
    """Return the groups that a stage keeps of a layer."""
    return info.kept[stage].get(layer.name, torch.arange(layer.groups))


def union_groups(kept: list[torch.Tensor]) -> torch.Tensor:
    """Return the groups that any stage keeps, sorted."""
    return torch.cat([torch.empty(0, dtype=torch.long), *kept]).unique()


def _union(
    layer: PrunableLayer,
    piece: Piece,
    held: list[tuple[int, torch.Tensor]],
    kept: list[torch.Tensor],
) -> torch.Tensor | None:
    """Merge the stages' slices of a parameter; None where they disagree on a common group."""
    dim = piece.axis
    if dim is None or piece.whole:
        first = held[0][1]
        return first if all(torch.equal(first, t) for _, t in held[1:]) else None
    groups = union_groups([kept[k] for k, _ in held])
    shape = list(held[0][1].shape)
    shape[dim] = len(groups) * layer.width * len(piece.starts)
    merged = held[0][1].new_empty(shape)
    places = []
    for k, tensor in held:
        mine = torch.searchsorted(groups, kept[k])
        place = layer.indices(piece, mine, shape[dim]).to(tensor.device)
        merged.index_copy_(dim, place, tensor)
        places.append((place, tensor))
    if all(torch.equal(merged.index_select(dim, place), t) for place, t in places):
        return merged
    return None


def _store_apart(
    name: str,
    held: list[tuple[int, torch.Tensor]],
    tensors: dict[str, torch.Tensor],
    aliases: dict[str, str],
) -> None:
    for k, tensor in held:
        stored = f"stage.{k}.{name}"
        for j, other in held[:k]:
            same = other.data_ptr() == tensor.data_ptr() and other.shape == tensor.shape
            if j < k and same and tensor.numel():
                aliases[stored] = aliases.get(f"stage.{j}.{name}", f"stage.{j}.{name}")
                break
        else:
            tensors[stored] = tensor.contiguous()
