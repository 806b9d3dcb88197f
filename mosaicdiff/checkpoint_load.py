"""Load a staged denoiser. The format is described in docs/checkpoint-format.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from .adapters import Adapter, adapter_for_class
from .checkpoint import CONFIG, FORMAT_VERSION, REPORT, kept_groups, union_groups, weights_name
from .groups import Piece, PrunableLayer
from .masked_storage import MASKED, read_masked
from .pack import LayerState, Parts
from .runtime import StagedDenoiser
from .stage_state import MaskedState, StageInfo, StageState
from .trajectory.stages import Division, Stage


def load(path: str | Path, **kwargs: Any) -> StagedDenoiser:
    """Read a staged denoiser; see `StagedDenoiser.from_pretrained`."""
    folder = _resolve_folder(path, kwargs)
    dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
    variant = kwargs.pop("variant", None)
    device = _device(kwargs.pop("device_map", None))
    memory = kwargs.pop("stage_memory", "resident")
    first = device if memory == "resident" else torch.device("cpu")
    if kwargs.pop("quantization_config", None) is not None:
        raise ValueError(
            "StagedDenoiser: quantization_config must be None: a staged denoiser cannot be "
            "quantised on loading in this version."
        )
    config = read_config(folder)
    weights = folder / weights_name(variant)
    if not weights.is_file():
        raise ValueError(f"StagedDenoiser: {folder} must hold {weights.name}, but it does not.")
    tensors = load_file(weights, device=str(first))
    dtype = torch.float32 if dtype is None else dtype
    tensors = cast(tensors, dtype, adapter_for_class(config["base"]["class"]))
    report = folder / REPORT
    values = json.loads(report.read_text()) if report.is_file() else {}
    staged = assemble(config, tensors, values, first)
    staged.set_stage_memory(memory)
    return staged.to(device)


def cast(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype, adapter: Adapter
) -> dict[str, torch.Tensor]:
    """Give a checkpoint's numbers a type; in half precision some stay float32, as in diffusers.

    Args:
        tensors: by stored name.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    found = {}
    for name, tensor in tensors.items():
        kept = half and not adapter.float32_modules.isdisjoint(name.split("."))
        wanted = torch.float32 if kept else dtype
        found[name] = tensor.to(wanted) if tensor.is_floating_point() else tensor
    return found


def _resolve_folder(path: str | Path, kwargs: dict[str, Any]) -> Path:
    """Find the local folder of a checkpoint, fetching it from the Hub where it is an id."""
    subfolder = kwargs.pop("subfolder", None)
    hub = {
        key: kwargs.pop(key, None) for key in ("revision", "token", "cache_dir", "local_files_only")
    }
    folder = Path(path)
    if not folder.is_dir():
        if str(path).count("/") != 1:
            raise ValueError(
                f"StagedDenoiser: path must be a folder or a Hub id, got {str(path)!r}."
            )
        from huggingface_hub import snapshot_download

        patterns = [f"{subfolder}/*"] if subfolder else None
        hub["local_files_only"] = bool(hub["local_files_only"])
        folder = Path(snapshot_download(str(path), allow_patterns=patterns, **hub))
    return folder / subfolder if subfolder else folder


def _device(device_map: Any) -> torch.device:
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(
            "StagedDenoiser: device_map must name one device (or be None), got "
            f"{device_map!r}. The stages share modules, so they stay together."
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check the configuration of a checkpoint folder.

    Raises:
        ValueError: it is missing, or of another kind or version.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"StagedDenoiser: {folder} must hold {CONFIG}, but it does not.")
    return check_config(json.loads(path.read_text(encoding="utf-8")), path)


def check_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the configuration of a checkpoint, read from `path`, if it is one of this version.

    Raises:
        ValueError: it is of another kind or version.
    """
    if config.get("_class_name") != "StagedDenoiser":
        raise ValueError(
            f"StagedDenoiser: {path} must describe a StagedDenoiser, got "
            f"{config.get('_class_name')}."
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"StagedDenoiser: format_version must be {FORMAT_VERSION}, got "
            f"{config.get('format_version')} in {path}. Load it with the mosaicdiff that wrote it, "
            "or prune again with this one."
        )
    return config


def assemble(
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    report: dict[str, Any],
    device: torch.device,
) -> StagedDenoiser:
    """Build the staged denoiser of a checkpoint's configuration and tensors, by stored name.

    On the meta device it has their shapes only.

    Raises:
        ValueError: a tensor is missing.
    """
    adapter = adapter_for_class(config["base"]["class"])
    base = adapter.empty(config["base"]["config"])
    # Older files are exact throughout.
    layers = adapter.layers(base, config["prune_config"].get("shared_norms", "exact"))
    count = len(config["stages"])
    kept = [
        {
            layer.name: tensors[f"kept.{k}.{layer.name}"].long().cpu()
            for layer in layers
            if f"kept.{k}.{layer.name}" in tensors
        }
        for k in range(count)
    ]
    info = StageInfo(
        base_class=config["base"]["class"],
        base_config=config["base"]["config"],
        division=Division(
            tuple(Stage(s["name"], s["first"], s["last"]) for s in config["stages"]),
            tuple(config["boundaries"]),
            # Older files leave it to the family how timesteps are called.
            **config.get("timesteps", {"naming": "sigma" if adapter.sigma_scale else "number"}),
        ),
        layers=layers,
        kept=kept,
        steps=[s["steps"] for s in config["stages"]],
        prune_config=config["prune_config"],
        report=report,
        source=config["source"],
    )
    masked, whole = _masked_states(base, count, config, tensors)
    _fill_base(base, info, config, tensors, whole)
    states: list[StageState] = [
        masked[k]
        | {
            layer.name: _layer_state(layer, k, info, config, tensors)
            for layer in layers
            if layer.name in kept[k]
        }
        for k in range(count)
    ]
    staged = StagedDenoiser.assemble(base, info, states)
    missing = [name for name, p in staged.named_parameters() if p.is_meta]
    if missing and device.type != "meta":
        raise ValueError(f"StagedDenoiser: weights must hold {missing[0]}, but they do not.")
    return staged.to(device)


def _masked_states(
    base: nn.Module, count: int, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[list[dict[str, LayerState | MaskedState]], dict[str, torch.Tensor]]:
    """Read the masked linears of each stage, and the weights that other stages keep whole."""
    states: list[dict[str, LayerState | MaskedState]] = [{} for _ in range(count)]
    whole: dict[str, torch.Tensor] = {}
    made: dict[str, MaskedState] = {}
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    for name in (n for n, how in config["storage"].items() if how == MASKED):
        if name not in shapes:
            raise ValueError(f"StagedDenoiser: {name} must be in the base model, but it is not.")
        for k in range(count):
            one = read_masked(name, k, shapes[name], config["aliases"], tensors, made)
            if isinstance(one, MaskedState):
                states[k][name.removesuffix(".weight")] = one
            else:
                whole[name] = one
    return states, whole


def _fill_base(
    base: nn.Module,
    info: StageInfo,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    whole_weights: dict[str, torch.Tensor],
) -> None:
    """Put what is shared, and whatever some stage keeps whole, into the base."""
    prefix = "shared."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    state |= whole_weights
    tied = {
        name.removeprefix(prefix): first.removeprefix(prefix)
        for name, first in config["aliases"].items()
        if name.startswith(prefix)
    }
    for layer in info.layers:
        whole = [k for k in range(len(info.kept)) if layer.name not in info.kept[k]]
        if whole:
            for piece in layer.pieces:
                if config["storage"].get(piece.name, MASKED) != MASKED:
                    stored = _stored(piece.name, whole[0], config, tensors)
                    _put_piece(base, state, layer, piece, stored)
    base.load_state_dict(state, strict=False, assign=True)
    for name, first in tied.items():
        module, _, leaf = name.rpartition(".")
        base.get_submodule(module)._parameters[leaf] = base.get_parameter(first)
    base.requires_grad_(False)


def _left_out(
    stage: int,
    piece: Piece,
    kept: torch.Tensor,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
) -> bool:
    """Tell whether a stage without groups of a layer holds none of a piece."""
    own = f"stage.{stage}.{piece.name}"
    apart = config["storage"][piece.name] != "union"
    nothing = len(kept) == 0 and piece.axis is not None
    return nothing and apart and config["aliases"].get(own, own) not in tensors


def _put_piece(
    base: nn.Module,
    state: dict[str, torch.Tensor],
    layer: PrunableLayer,
    piece: Piece,
    stored: torch.Tensor,
) -> None:
    """Put what a stage keeps whole of a layer into the state of the base."""
    if not piece.partial or piece.axis is None:
        state[piece.parameter] = stored
        return
    if piece.parameter not in state:  # of a packed linear, some of it may be nobody's
        dense = base.get_parameter(piece.parameter)
        state[piece.parameter] = stored.new_zeros(dense.shape)
    run = layer.columns_of_groups
    for number, start in enumerate(piece.starts):
        target = state[piece.parameter].narrow(piece.axis, start, run)
        target.copy_(stored.narrow(piece.axis, number * run, run))


def _stored(
    name: str, stage: int, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> torch.Tensor:
    own = f"stage.{stage}.{name}"
    union = config["storage"][name] == "union"
    stored = f"union.{name}" if union else config["aliases"].get(own, own)
    if stored not in tensors:
        raise ValueError(f"StagedDenoiser: weights must hold {stored}, but they do not.")
    return tensors[stored]


def _layer_state(
    layer: PrunableLayer,
    stage: int,
    info: StageInfo,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
) -> LayerState:
    kept = info.kept[stage][layer.name]
    parts: Parts = {}
    for piece in layer.pieces:
        name = piece.name
        if name not in config["storage"] or _left_out(stage, piece, kept, config, tensors):
            continue
        tensor = _stored(name, stage, config, tensors)
        if piece.whole:
            tensor = layer.narrow(piece, tensor, kept)
        elif config["storage"][name] == "union" and piece.axis is not None:
            holders = [
                kept_groups(info, k, layer)
                for k in range(len(info.kept))
                if len(kept_groups(info, k, layer)) > 0
            ]
            place = torch.searchsorted(union_groups(holders), kept)
            tensor = layer.narrow(piece, tensor, place)
        parts[name] = tensor
    return LayerState(kept, parts)
