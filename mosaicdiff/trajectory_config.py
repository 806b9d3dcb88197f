"""What the user asks of calibration along sampled trajectories: one frozen, validated value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .checks import require_whole_numbers
from .trajectory.weights import WEIGHTS

#: Of step i (0 is the noisiest) of N.
StepWeight = Callable[[int, int], float]


@dataclass(frozen=True)
class TrajectoryConfig:
    """Say how `activations="trajectory"` runs the pipeline and weighs its steps.

    Args:
        samples: pictures sampled, all stages together; prompts are used in turn.
        batch_size: of a call of the pipeline; guidance doubles what the denoiser sees.
        weights: of the steps: a name of `trajectory.weights.WEIGHTS`, one number for each step,
            noisiest first, or a function of (step, steps).
        weight_range: least and largest weight of a named kind.
        guidance_scale: None is the pipeline's own default.
        options: other arguments of the pipeline's call, e.g. height and width.

    Raises:
        ValueError: a field is out of range; the message names the field and the rule.

    Source: OBS-Diff (arXiv 2510.06751).
    """

    samples: int = 64
    batch_size: int = 8
    weights: str | tuple[float, ...] | StepWeight = "log_decrease"
    weight_range: tuple[float, float] = (0.8, 1.2)
    guidance_scale: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight_range", tuple(self.weight_range))
        if isinstance(self.weights, str):
            if self.weights not in WEIGHTS:
                raise ValueError(
                    f"TrajectoryConfig: weights must be one of {', '.join(WEIGHTS)}, a list with "
                    f"a number for each step, or a function, got {self.weights!r}."
                )
        elif not callable(self.weights):
            object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        least, largest = self.weight_range
        if not (0 < least <= largest and math.isfinite(largest)):
            raise ValueError(
                "TrajectoryConfig: weight_range must be two positive numbers, the least first, "
                f"got {self.weight_range}."
            )
        scale = self.guidance_scale
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise ValueError(
                f"TrajectoryConfig: guidance_scale must be finite and not negative, got {scale}."
            )
        require_whole_numbers(self, {"samples": 1, "batch_size": 1})

    def to_dict(self, steps: int) -> dict[str, Any]:
        """Return plain values; a function is written out for so many steps."""
        weights = self.weights
        if callable(weights):
            weights = tuple(weights(i, steps) for i in range(steps))
        return {
            "samples": self.samples,
            "batch_size": self.batch_size,
            "weights": weights if isinstance(weights, str) else list(weights),
            "weight_range": list(self.weight_range),
            "guidance_scale": self.guidance_scale,
            "options": dict(self.options),
        }
