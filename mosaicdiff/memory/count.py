"""Bytes that a staged denoiser takes: counted from shapes, and of what is there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..checkpoint import storage_of, weights_name
from ..checkpoint_load import assemble, read_config
from ..groups import leading_parameter
from ..masked_storage import MASKED
from ..runtime import StagedDenoiser
from ..surgery import Surgeon
from .swap import find_slots, shelve

#: Types by their names in safetensors.
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StatedMemory:
    """What a staged denoiser takes in each mode, by count; all in bytes.

    Args:
        dense: the denoiser it was pruned from, as it is published.
        dense_distinct: the same, what equals another of its tensors counted once.
        disk: the weights file; without its header where there is no file yet.
        resident: on the device, all stages there.
        swap_device: on the device in swap mode, in the largest stage.
        swap_host: the bank in the host's memory in swap mode.
    """

    dense: int
    dense_distinct: int
    disk: int
    resident: int
    swap_device: int
    swap_host: int

    def ratios(self, distinct: bool = True) -> dict[str, float]:
        """Return each as a multiple of the dense denoiser, its copies counted once or as stored."""
        whole = self.dense_distinct if distinct else self.dense
        names = ("disk", "resident", "swap_device", "swap_host")
        return {name: getattr(self, name) / whole for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {
            **asdict(self),
            "of_dense": self.ratios(distinct=False),
            "of_dense_distinct": self.ratios(),
        }


@dataclass(frozen=True)
class MeasuredMemory:
    """What is there now; all in bytes.

    Args:
        live: by device, storages of parameters and buffers, each once and whole.
        bank: of the host's, that of swap mode.
        peak: the most that was allocated on the CUDA device since its statistics were reset, by
            whoever; None without one.
    """

    live: dict[str, int]
    bank: int
    peak: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)


def measure_memory(model: nn.Module) -> MeasuredMemory:
    """Count the storages that a denoiser, dense or staged, holds at the moment.

    A slice counts as all that its storage keeps alive. On the CPU, what swap mode needs not gather
    is the bank's own storage, and counted in both.
    """
    own = [*model.parameters(), *model.buffers()]
    swap = model.swap if isinstance(model, StagedDenoiser) else None
    bank = [] if swap is None else [shelf.tensor for shelf in swap.shelves]
    live: dict[str, int] = defaultdict(int)
    for place, size in _storages(own).values():
        live[place] += size
    device = leading_parameter(model).device
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return MeasuredMemory(dict(live), sum(size for _, size in _storages(bank).values()), peak)


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, tuple[str, int]]:
    found = {}
    for tensor in tensors:
        storage = tensor.detach().untyped_storage()
        found[storage._cdata] = (tensor.device.type, storage.nbytes())
    return found


def state_memory(staged: StagedDenoiser, unions: Mapping[str, bool] | None = None) -> StatedMemory:
    """Count what a staged denoiser takes in every mode, whichever it is in.

    Args:
        staged: may be on the meta device if nothing is masked; without `unions` its writers are
            then taken for slices of the dense ones and its readers for refitted, as pruning
            leaves them.
        unions: which parameters all stages hold slices of, where that is known.

    Raises:
        ValueError: it is on the meta device and masked.
    """
    with staged.whole_stages():
        return _state(staged, unions)


def _state(staged: StagedDenoiser, unions: Mapping[str, bool] | None) -> StatedMemory:
    info, stages = staged.info, list(staged.stage_models)
    meta = leading_parameter(staged).is_meta
    if meta and any(info.masks):
        raise ValueError(
            "state_memory: staged must hold its weights where some are masked, but it is on the "
            "meta device. Load it."
        )
    slots = find_slots(stages)
    swapped = {id(slot.parameter) for slot in slots}
    shared = _bytes(p for p in staged.parameters() if id(p) not in swapped)
    shared += _bytes(staged.buffers())
    own = [_bytes(s.parameter for s in slots if k in s.stages) for k in range(len(stages))]
    bank = 0
    for group in shelve(slots, Surgeon(staged.adapter, info.layers), info.kept, unions):
        shelves = {id(s.source.shelf): s.source.shelf for s in group if s.source is not None}
        bank += sum(shelf.bytes for shelf in shelves.values())
        for slot in group:
            slot.source = None  # what was merged is counted, not kept
    if meta:
        passing = _bytes(staged.buffers()) - _bytes(_saved_buffers(stages[0]))
        indices = 4 * sum(len(groups) for kept in info.kept for groups in kept.values())
        disk = shared - passing + bank + indices
    else:
        disk = _bytes(storage_of(staged)[0].values())
    dense, repeated = _dense(staged)
    return StatedMemory(
        dense=dense,
        dense_distinct=dense - repeated,
        disk=disk,
        resident=shared + sum(_bytes([slot.parameter]) for slot in slots),
        swap_device=shared + max(own),
        swap_host=bank,
    )


def _dense(staged: StagedDenoiser) -> tuple[int, int]:
    """Return bytes of the dense denoiser in the types at hand, and of those the copies'."""
    held = staged.stage_models[0].state_dict(keep_vars=True)
    usual = leading_parameter(staged).dtype
    total = repeated = 0
    seen: set[int] = set()
    for name, tensor in staged.adapter.empty(staged.info.base_config).state_dict().items():
        mine = held.get(name)
        floating = tensor.is_floating_point()
        dtype = mine.dtype if mine is not None else usual if floating else tensor.dtype
        size = tensor.numel() * dtype.itemsize
        total += size
        if mine is not None:
            repeated += size if id(mine) in seen else 0
            seen.add(id(mine))
    return total, repeated


def _saved_buffers(stage: nn.Module) -> list[torch.Tensor]:
    parameters = {id(p) for p in stage.parameters()}
    state = stage.state_dict(keep_vars=True).values()
    return list({id(t): t for t in state if id(t) not in parameters}.values())


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def state_folder(folder: Path, variant: str | None = None) -> StatedMemory:
    """Count what a saved staged denoiser takes in every mode, from the shapes in its file.

    Values are read only where weights are masked.

    Args:
        folder: of a checkpoint.

    Raises:
        ValueError: it holds none.
    """
    config = read_config(folder)
    path = folder / weights_name(variant)
    if not path.is_file():
        raise ValueError(f"StagedDenoiser: {folder} must hold {path.name}, but it does not.")
    masked = MASKED in config["storage"].values()
    tensors = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            shape, kind = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
            empty = torch.empty(shape, dtype=_TYPES[kind], device="meta")
            read = masked or name.startswith("kept.")
            tensors[name] = file.get_tensor(name) if read else empty
    place = torch.device("cpu" if masked else "meta")
    staged = assemble(config, tensors, {}, place)
    unions: dict[str, bool] = {}
    for layer in staged.info.layers:
        for piece in layer.pieces:
            known = unions.get(piece.parameter, True)
            unions[piece.parameter] = known and config["storage"].get(piece.name) == "union"
    stated = state_memory(staged, None if masked else unions)
    return StatedMemory(**{**asdict(stated), "disk": path.stat().st_size})
