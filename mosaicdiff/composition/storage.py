"""Weights of a staged denoiser in fewer bits: each module once, whichever stages share it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.hooks._common import _GO_LC_SUPPORTED_PYTORCH_LAYERS
from diffusers.hooks.layerwise_casting import (
    DEFAULT_SKIP_MODULES_PATTERN,
    apply_layerwise_casting_hook,
)
from torch import nn

from ..model_checks import check_not_optimized
from ..runtime import StagedDenoiser
from .hindrances import check_plain_weights, check_resident

#: Says of a module and its name in the stage whether it is to be quantised.
Filter = Callable[[nn.Module, str], bool]


def cast_layerwise(
    stages: Sequence[Any],
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip_patterns: Sequence[str] | None,
    skip_classes: tuple[type[nn.Module], ...] | None,
    non_blocking: bool,
) -> None:
    """Store layers in one type and compute in another, as diffusers does with a dense model.

    Layers go by their names in the stage, so that the same ones are left out as of the dense one.
    """
    chosen: dict[int, nn.Module] = {}
    for stage in stages:
        patterns = set(DEFAULT_SKIP_MODULES_PATTERN if skip_patterns is None else skip_patterns)
        patterns |= set(stage._keep_in_fp32_modules or ())
        patterns |= set(stage._skip_layerwise_casting_patterns or ())

        def visit(module: nn.Module, name: str, patterns: set[str] = patterns) -> None:
            skipped = skip_classes is not None and isinstance(module, skip_classes)
            if skipped or any(re.search(pattern, name) for pattern in patterns):
                return
            if isinstance(module, _GO_LC_SUPPORTED_PYTORCH_LAYERS):
                chosen[id(module)] = module
                return
            for leaf, child in module.named_children():
                visit(child, f"{name}.{leaf}" if name else leaf)

        visit(stage, "")
    _own_parameters(stages, chosen)
    for module in chosen.values():
        apply_layerwise_casting_hook(module, storage_dtype, compute_dtype, non_blocking)


def _own_parameters(stages: Sequence[nn.Module], chosen: dict[int, nn.Module]) -> None:
    """Let nothing that is computed with as it is share a parameter with what is cast.

    The bias that is left of a layer in one stage is that of the whole layer in another.
    """
    cast = {id(p) for module in chosen.values() for p in module.parameters(recurse=False)}
    for stage in stages:
        for module in stage.modules():
            for name, parameter in module._parameters.items():
                if id(module) not in chosen and id(parameter) in cast and parameter is not None:
                    own = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                    module._parameters[name] = own


def quantize(model: Any, config: Any, filter_fn: Filter | None = None) -> None:
    """Quantise the linears of the pruned denoisers of a pipeline by torchao, each once.

    torchao's own `quantize_` meets a linear that stages share once for each stage, and fails. The
    quantised denoiser samples, but is not saved: save before.

    Args:
        model: a pipeline, or a pruned denoiser.
        config: of torchao, such as `Int8WeightOnlyConfig()`.
        filter_fn: of a module and its name in the stage; None takes every linear of two rows and
            two columns or more: of fewer torchao makes no scales.

    Raises:
        ValueError: nothing is pruned, or weights are not plain ones.
        RuntimeError: torchao is not installed.
    """
    parts = [model] if isinstance(model, StagedDenoiser) else model.components.values()
    found = [part for part in parts if isinstance(part, StagedDenoiser)]
    if not found:
        raise ValueError(
            "quantize: model must hold a pruned denoiser, got none. Give a dense one to torchao's "
            "quantize_."
        )
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        raise RuntimeError(
            f"quantize: torchao must be installed, but: {error}. pip install mosaicdiff[compose]"
        ) from None
    for staged in found:
        check_not_optimized(staged, "quantize")
        check_resident(staged, "quantize")
        check_plain_weights(staged, "quantize")
    done: set[int] = set()

    def take(module: nn.Module, name: str) -> bool:
        wanted = isinstance(module, nn.Linear) and min(module.weight.shape) > 1
        if filter_fn is not None:
            wanted = filter_fn(module, name)
        if not wanted or id(module) in done:
            return False
        done.add(id(module))
        return True

    for staged in found:
        for stage in staged.stage_models:
            quantize_(stage, config, filter_fn=take)
