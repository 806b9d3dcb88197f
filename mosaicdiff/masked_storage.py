"""Masked linears in a checkpoint: the kept values, and one bit for every weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .stage_state import MaskedState, StageInfo

#: How `storage` in config.json calls a parameter that some stage masks.
MASKED = "masked"


def masked_parameters(info: StageInfo) -> tuple[str, ...]:
    """Name the weights that some stage masks, sorted."""
    return tuple(sorted({f"{linear}.weight" for masks in info.masks for linear in masks}))


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask's bits in row-major order, the first in the highest bit, uint8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=None))


def unpack_mask(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Undo `pack_mask`, (m, n) bool on the CPU.

    Raises:
        ValueError: it is not uint8, not as long as the shape asks, or its last bits are set.
    """
    count = int(np.prod(shape))
    if packed.dtype != torch.uint8 or packed.shape != ((count + 7) // 8,):
        raise ValueError(
            f"must be ({(count + 7) // 8},) torch.uint8, got {tuple(packed.shape)} {packed.dtype}"
        )
    bits = np.unpackbits(packed.cpu().numpy())
    if bits[count:].any():
        raise ValueError(f"must have nothing set after bit {count}")
    return torch.from_numpy(bits[:count].astype(bool)).reshape(tuple(shape))


def store_masked(
    info: StageInfo,
    stages: Sequence[nn.Module],
    tensors: dict[str, torch.Tensor],
    aliases: dict[str, str],
) -> dict[str, str]:
    """Add the masked linears of all stages to a checkpoint's tensors and aliases.

    Of stages that hold the same weight only the first is stored. A stage that keeps the linear
    whole stores it as `stage.<k>.<parameter>`.

    Returns:
        The entries of `storage`.

    Raises:
        ValueError: a weight is not zero where its mask says so, or no plain tensor any more, or
            the stages that keep a linear whole hold different ones.
    """
    parameters = masked_parameters(info)
    for name in parameters:
        linear = name.removesuffix(".weight")
        earlier: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []
        for k, stage in enumerate(stages):
            module: Any = stage.get_submodule(linear)
            weight = module.weight.detach()
            mask = info.masks[k].get(linear)
            _check_zeros(name, k, weight, mask)
            stored = _names(name, k, masked=mask is not None)
            first = next((j for j, w, m in earlier if _same(w, weight) and _same(m, mask)), None)
            if first is not None:
                whole = _names(name, first, masked=mask is not None)
                aliases.update(zip(stored, whole, strict=True))
                continue
            if mask is None and any(m is None for _, _, m in earlier):
                raise ValueError(
                    f"save_pretrained: {name} must be shared by all stages that keep it whole, "
                    "but they hold different tensors. Was a stage trained alone?"
                )
            earlier.append((k, weight, mask))
            if mask is None:
                tensors[stored[0]] = weight.contiguous()
            else:
                tensors[stored[0]] = weight[mask.to(weight.device)]
                tensors[stored[1]] = pack_mask(mask)
    return dict.fromkeys(parameters, MASKED)


def read_masked(
    name: str,
    stage: int,
    shape: Sequence[int],
    aliases: dict[str, str],
    tensors: dict[str, torch.Tensor],
    made: dict[str, MaskedState],
) -> MaskedState | torch.Tensor:
    """Return what a stage holds of a parameter whose storage is `masked`.

    Args:
        shape: (m, n) of the dense weight.
        made: states by the stored name of their values; those of an alias are the same object.

    Returns:
        The masked state, or the whole weight where the stage keeps all of it.

    Raises:
        ValueError: a tensor is missing or does not fit; the message names it.
    """
    (whole,) = _names(name, stage, masked=False)
    whole = aliases.get(whole, whole)
    if whole in tensors:
        _require(tensors[whole].shape == tuple(shape), whole, tuple(shape), tensors[whole])
        return tensors[whole]
    values, bits = (aliases.get(n, n) for n in _names(name, stage, masked=True))
    for needed in (bits, values):
        if needed not in tensors:
            raise ValueError(
                f"StagedDenoiser: weights must hold {needed}, but they do not. "
                "The file is damaged: copy it again."
            )
    if values not in made:
        try:
            mask = unpack_mask(tensors[bits], shape)
        except ValueError as error:
            raise ValueError(
                f"StagedDenoiser: {bits} {error}. The file is damaged: copy it again."
            ) from None
        kept = tensors[values]
        _require(kept.shape == (int(mask.sum()),), values, (int(mask.sum()),), kept)
        weight = kept.new_zeros(tuple(shape))
        weight[mask.to(kept.device)] = kept
        made[values] = MaskedState(mask, weight)
    return made[values]


def stored_size(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[int, int]:
    """Return parameters and bytes of a checkpoint's tensors, by stored name.

    The bits of masks count as bytes, not as parameters; the kept indices of groups as neither.
    """
    parameters = size = 0
    for name, tensor in tensors:
        if name.startswith("kept."):
            continue
        size += tensor.numel() * tensor.element_size()
        parameters += 0 if name.startswith("mask.") else tensor.numel()
    return parameters, size


def _names(name: str, stage: int, masked: bool) -> tuple[str, ...]:
    if masked:
        return f"values.{stage}.{name}", f"mask.{stage}.{name}"
    return (f"stage.{stage}.{name}",)


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def _check_zeros(name: str, stage: int, weight: Any, mask: torch.Tensor | None) -> None:
    if type(weight) is not torch.Tensor or weight.layout is not torch.strided:
        raise ValueError(
            f"save_pretrained: {name} must be a dense tensor, got {type(weight).__name__}. "
            "Save before to_semi_structured, which is for running only."
        )
    if mask is not None and bool(weight[~mask.to(weight.device)].any()):
        raise ValueError(
            f"save_pretrained: {name} of stage {stage} must be zero where its mask is false, got "
            "other values. Multiply trained weights by StagedDenoiser.masks after every step."
        )


def _require(fits: bool, name: str, shape: tuple[int, ...], tensor: torch.Tensor) -> None:
    if not fits:
        raise ValueError(
            f"StagedDenoiser: {name} must be {shape}, got {tuple(tensor.shape)}. "
            "The file is damaged: copy it again."
        )
