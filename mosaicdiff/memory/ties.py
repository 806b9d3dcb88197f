"""Parameters that a denoiser holds several times: every block of a DiT has the same embedders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..pack import StageBuilder


def equal_parameters(denoiser: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """Name the parameters that equal an earlier one, bit for bit, and that one.

    Args:
        denoiser: dense. On the meta device only parameters that are one object are equal.
        patterns: of the names of modules that may be copies of each other.
    """
    firsts: dict[tuple[str, str], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    twins = {}
    for pattern, inner, name, parameter in _candidates(denoiser, patterns):
        known = firsts[pattern, inner]
        found = next((first for first, other in known if _equal(parameter, other)), None)
        if found is None:
            known.append((name, parameter))
        else:
            twins[name] = found
    return twins


def repeated_parameters(denoiser: nn.Module, patterns: Sequence[str]) -> int:
    """Count the parameters that are copies of others, which a bank of stages holds once."""
    twins = equal_parameters(denoiser, patterns)
    return sum(denoiser.get_parameter(name).numel() for name in twins)


def tie(stage: StageBuilder, twins: Mapping[str, str]) -> None:
    """Let a stage hold one parameter where the dense denoiser, left alone, holds equal ones.

    Args:
        stage: under construction.
        twins: as `equal_parameters` names them.
    """
    for name, first in twins.items():
        module, _, leaf = name.rpartition(".")
        stage.own(module)._parameters[leaf] = stage.root.get_parameter(first)


def tie_storages(base: nn.Module, stages: Iterable[nn.Module]) -> None:
    """Let modules whose parameters are one tensor hold one parameter, so that they stay one.

    Moved or cast, two parameters of one tensor would part. The base is left alone.
    """
    known = {_place(parameter): parameter for parameter in base.parameters()}
    for stage in stages:
        for module in stage.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None and parameter.numel():
                    module._parameters[leaf] = known.setdefault(_place(parameter), parameter)


def _place(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    storage = tensor.untyped_storage()._cdata  # tells on the meta device too
    return storage, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _candidates(
    denoiser: nn.Module, patterns: Sequence[str]
) -> Iterator[tuple[str, str, str, nn.Parameter]]:
    for name, module in denoiser.named_modules(remove_duplicate=False):
        pattern = next((p for p in patterns if fnmatchcase(name, p)), None)
        if pattern is not None:
            for inner, parameter in module.named_parameters(remove_duplicate=False):
                yield pattern, inner, f"{name}.{inner}", parameter


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other:
        return True
    if one.is_meta or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.device == other.device and torch.equal(one, other)
