"""Which steps of a sampler a denoiser is called at, where a pipeline has two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Span:
    """A run of timesteps, as the scheduler calls them: at_least <= t < below.

    Wan 2.2 calls `transformer` from boundary_ratio * T upwards and `transformer_2` below.
    """

    at_least: float = -math.inf
    below: float = math.inf

    @property
    def whole(self) -> bool:
        """Whether it leaves nothing out."""
        return self.at_least == -math.inf and self.below == math.inf

    def holds(self, timesteps: Any) -> np.ndarray:
        """Tell which timesteps are in it, as booleans."""
        given = np.asarray(timesteps, dtype=np.float64)
        return (given >= self.at_least) & (given < self.below)

    def __str__(self) -> str:
        parts = []
        if self.at_least != -math.inf:
            parts.append(f"from {self.at_least:g}")
        if self.below != math.inf:
            parts.append(f"below {self.below:g}")
        return " and ".join(parts) or "all"
