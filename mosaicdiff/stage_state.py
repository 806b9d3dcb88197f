"""What is remembered of each stage, and what of it differs from the dense denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .groups import PrunableLayer
from .pack import LayerState, make_linear
from .trajectory.stages import Division


@dataclass(frozen=True)
class MaskedState:
    """A linear of one stage without some of its weights: mask (m, n) bool, True where kept.

    The weight (m, n) is zero elsewhere; the bias stays the dense denoiser's.
    """

    mask: torch.Tensor
    weight: torch.Tensor


#: What of one stage differs from the dense denoiser: layers and masked linears, by name.
StageState = Mapping[str, LayerState | MaskedState]


@dataclass
class StageInfo:
    """What a staged denoiser remembers of how it was made, and what a checkpoint holds."""

    base_class: str
    base_config: dict[str, Any]
    division: Division
    layers: tuple[PrunableLayer, ...]
    #: For each stage, kept groups of every layer that is not whole.
    kept: list[dict[str, torch.Tensor]]
    #: Sampling steps of each stage in the plan.
    steps: list[int]
    prune_config: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    #: For each stage, masks of the linears that single weights were removed from (bool, CPU).
    masks: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.masks:
            self.masks = [{} for _ in self.kept]


def refuse_masked(layer: PrunableLayer, state: StageState) -> None:
    """Raise ValueError where a layer that shrinks is masked too."""
    for name in layer.modules:
        if name in state:
            raise ValueError(
                f"StagedDenoiser: {name} must not be masked where {layer.name} shrinks, got both. "
                "Remove groups or single weights of a layer, not both."
            )


def masked_linear(base: nn.Module, name: str, state: MaskedState) -> nn.Module:
    """Make the linear of a masked weight, with the dense one's own bias parameter."""
    dense: Any = base.get_submodule(name)
    if not state.weight.shape == state.mask.shape == dense.weight.shape:
        raise ValueError(
            f"StagedDenoiser: weight and mask of {name} must be {tuple(dense.weight.shape)}, got "
            f"{tuple(state.weight.shape)} and {tuple(state.mask.shape)}."
        )
    linear = make_linear(state.weight, dense.bias)
    linear.register_parameter("bias", dense.bias)  # itself: it stays shared when moved or trained
    return linear
