"""What the user asks for: one frozen, validated value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

CRITERIA = ("obs", "magnitude", "wanda", "random")
COMPENSATIONS = ("plain", "affine", "none")
ALLOCATIONS = ("score", "uniform", "explicit")


@dataclass(frozen=True)
class PruneConfig:
    """Say how a denoiser is divided, allocated, calibrated and pruned.

    Args:
        sparsity: share of the prunable MACs to remove, averaged over the sampling steps, in
            [0, 1). Ignored by `allocation="explicit"`, which states its own.
        allocation: `score` gives each stage in proportion to 1 - its mean step score,
            `uniform` gives all stages the same, `explicit` takes the two fields below.
        stage_sparsity: one share for each stage, noisiest first.
        layer_sparsity: shares for single layers, by layer name: one for each stage. Layers not
            named take their stage's share.
        stages: 3 (early, middle, late; fewer where one is empty) or 1 (one network).
        boundaries: explicit train timesteps instead of the closed form: a timestep at or above a
            boundary belongs to the noisier side. Any number of stages.
        threshold: M, the share of the largest score at which the middle stage begins.
        snr_weight: lambda, the weight of ln SNR in the score.
        max_sparsity: the most that one stage may give (benchmarks.bench_quality cap).
        criterion: `obs`, or a baseline: `magnitude`, `wanda`, `random`.
        compensation: `plain` least squares on what is kept, `affine` with a new bias, `none`.
        steps: sampling steps that the plan is made for.
        samples: calibration samples drawn for each stage.
        batch_size: calibration samples run at once.
        seed: of everything that is drawn.
        null_share: share of the calibration samples that carry the null condition, in [0, 1].
        damping: added to the Hessian's diagonal, relative to its mean.
        round_to: kept FFN neurons are a multiple of this (or all of them).

    Raises:
        ValueError: a field is out of range; the message names the field and the rule.
    """

    sparsity: float = 0.3
    allocation: str = "score"
    stage_sparsity: tuple[float, ...] | None = None
    layer_sparsity: Mapping[str, tuple[float, ...]] | None = None
    stages: int = 3
    boundaries: tuple[int, ...] | None = None
    threshold: float = 0.55
    snr_weight: float = 0.01
    max_sparsity: float = 0.95
    criterion: str = "obs"
    compensation: str = "plain"
    steps: int = 50
    samples: int = 512
    batch_size: int = 64
    seed: int = 0
    null_share: float = 0.1
    damping: float = 0.01
    round_to: int = 1

    def __post_init__(self) -> None:
        self._freeze_sequences()
        self._check_choices()
        self._check_shares()
        self._check_counts()
        self._check_explicit()

    def _freeze_sequences(self) -> None:
        for name in ("stage_sparsity", "boundaries"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if self.layer_sparsity is not None:
            frozen = {name: tuple(shares) for name, shares in self.layer_sparsity.items()}
            object.__setattr__(self, "layer_sparsity", frozen)

    def _check_choices(self) -> None:
        for name, choices in (
            ("allocation", ALLOCATIONS),
            ("criterion", CRITERIA),
            ("compensation", COMPENSATIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"PruneConfig: {name} must be one of {', '.join(choices)}, "
                    f"got {getattr(self, name)!r}."
                )
        if self.stages not in (1, 3):
            raise ValueError(
                f"PruneConfig: stages must be 3 or 1, got {self.stages}. The closed form finds an "
                "early, a middle and a late stage; for another number give boundaries."
            )

    def _check_shares(self) -> None:
        _check_share("sparsity", self.sparsity)
        for share in self.stage_sparsity or ():
            _check_share("stage_sparsity", share, closed=True)
        for name, shares in (self.layer_sparsity or {}).items():
            for share in shares:
                _check_share(f"layer_sparsity[{name!r}]", share, closed=True)
        if not 0 < self.max_sparsity <= 1:
            raise ValueError(
                f"PruneConfig: max_sparsity must be in (0, 1], got {self.max_sparsity}."
            )
        if not 0 < self.threshold < 1:
            raise ValueError(f"PruneConfig: threshold must be in (0, 1), got {self.threshold}.")
        if not (math.isfinite(self.snr_weight) and self.snr_weight >= 0):
            raise ValueError(
                f"PruneConfig: snr_weight must be finite and not negative, got {self.snr_weight}."
            )
        if not 0 <= self.null_share <= 1:
            raise ValueError(f"PruneConfig: null_share must be in [0, 1], got {self.null_share}.")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(
                f"PruneConfig: damping must be finite and not negative, got {self.damping}."
            )

    def _check_counts(self) -> None:
        for name in ("steps", "samples", "batch_size", "round_to"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"PruneConfig: {name} must be a whole number of at least 1, got {value!r}."
                )
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(
                f"PruneConfig: seed must be a whole number, not negative, got {self.seed!r}."
            )
        if self.boundaries is not None and (
            not self.boundaries
            or any(not isinstance(b, int) or b < 1 for b in self.boundaries)
            or len(set(self.boundaries)) != len(self.boundaries)
        ):
            raise ValueError(
                "PruneConfig: boundaries must be distinct whole timesteps of at least 1, "
                f"got {self.boundaries}."
            )

    def _check_explicit(self) -> None:
        stated = self.stage_sparsity is not None or self.layer_sparsity is not None
        if self.allocation == "explicit" and self.stage_sparsity is None:
            raise ValueError(
                "PruneConfig: stage_sparsity must be given with allocation='explicit', got None. "
                "Give one share for each stage, noisiest first."
            )
        if stated and self.allocation != "explicit":
            raise ValueError(
                "PruneConfig: allocation must be 'explicit' with stage_sparsity or "
                f"layer_sparsity, got {self.allocation!r}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold; `from_dict` is the inverse."""
        values = asdict(self)
        for name in ("stage_sparsity", "boundaries"):
            if values[name] is not None:
                values[name] = list(values[name])
        if self.layer_sparsity is not None:
            values["layer_sparsity"] = {k: list(v) for k, v in self.layer_sparsity.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruneConfig:
        """Build from plain values.

        Raises:
            ValueError: a key is unknown, or a value out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"PruneConfig: keys must be among {', '.join(sorted(known))}, "
                f"got {', '.join(unknown)}."
            )
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> PruneConfig:
        """Read a JSON file of fields.

        Raises:
            ValueError: the file is missing, is not a JSON object, or a field is wrong.
        """
        return cls.from_dict(_read_object(path))


def _read_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"PruneConfig: {path} must be a file, but there is none.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"PruneConfig: {path} must be a JSON object: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"PruneConfig: {path} must hold a JSON object, got {type(values).__name__}."
        )
    return values


def _check_share(name: str, share: float, closed: bool = False) -> None:
    above = share > 1 if closed else share >= 1
    if not isinstance(share, (int, float)) or math.isnan(share) or share < 0 or above:
        raise ValueError(
            f"PruneConfig: {name} must be in [0, 1{']' if closed else ')'}, got {share}. "
            "It is a share of the prunable MACs, e.g. 0.3."
        )
