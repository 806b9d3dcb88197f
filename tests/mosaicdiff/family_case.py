"""What the promises of every family are tried on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class FamilyCase:
    """One family, or one kind of it.

    Args:
        make: builds the denoiser with random weights, always the same, in float32.
        batch: latents (B, ...) as the scheduler steps them, timesteps (B,) as it calls them, and
            the conditions of a calibration batch; float32.
        fuses: what is raised where projections are fused after cutting, which is refused; None
            where that is fine.
    """

    make: Callable[[], Any]
    batch: Callable[[], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
    fuses: str | None = None
