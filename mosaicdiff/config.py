"""What the user asks for: one frozen, validated value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .allocation.budget import DEFAULT_SPARSITY, UNITS, Budget
from .checks import require_choices, require_whole_numbers
from .search_config import SearchConfig

CRITERIA = ("obs", "magnitude", "wanda", "random")
COMPENSATIONS = ("plain", "affine", "none")
ALLOCATIONS = ("score", "uniform", "optimal", "evolutionary", "explicit")
WEIGHTINGS = ("raw", "sensitivity", "trajectory")
CHOICES = ("separate", "nested", "shared")
GRANULARITIES = ("width", "layers", "blocks")
DEPTH_RANKS = ("curve", "error", "cosine")
#: Stages where none are asked for: those of Diff-ES for a search, of MosaicDiff otherwise.
SEARCHED_STAGES, CLOSED_FORM_STAGES = 10, 3


@dataclass(frozen=True)
class PruneConfig:
    """Say how a denoiser is divided, allocated, calibrated and pruned.

    At most one budget is given (see `Budget` for the units); `sparsity` 0.3 where none is.
    `allocation="explicit"` states its own shares and takes no budget.

    Args:
        sparsity: share of the prunable MACs to remove, averaged over the sampling steps, in
            [0, 1), as a number or as text such as `30%`.
        macs: of one image, e.g. `0.6x` of the dense model's, or `3.9T`.
        params: that the checkpoint holds, all stages together, e.g. `0.8x` or `450M`.
        size: of the checkpoint's weights, e.g. `0.8x` or `1.2GB`.
        latency: of a call on this device, mean over the steps, e.g. `0.7x` or `25ms`.
        quality: the largest sparsity whose measured error stays under this (see
            `trajectory.probe.latent_error`).
        allocation: `optimal` takes from every layer of every stage what it loses least by;
            `score`, MosaicDiff's, gives each stage in proportion to 1 - its mean step score and
            all layers of a stage the same; `uniform` gives all stages the same; `evolutionary`
            searches from `optimal` on (`search`); `explicit` takes the two fields below.
        stage_sparsity: one share for each stage, noisiest first.
        layer_sparsity: shares for single layers, by layer name: one for each stage. Layers not
            named take their stage's share.
        stages: 3 (early, middle, late by the closed form; fewer where one is empty), another
            number (stages of equal sampling steps; 1 is one network), or `auto` (boundaries
            from the data, up to `max_stages`). None: 10 for `evolutionary`, 3 otherwise.
        boundaries: explicit train timesteps instead of the closed form: a timestep at or above a
            boundary belongs to the noisier side. Any number of stages.
        bins: of `stages="auto"`: how many runs of equal sampling steps are calibrated, whose
            edges may become boundaries.
        max_stages: of `stages="auto"`.
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
        weighting: of the layers' errors in `optimal`: `raw`, by how much the denoiser's output
            depends on the layer's (`sensitivity`), or that times how much the final latents
            depend on the stage's outputs (`trajectory`).
        choice: `separate` groups in every stage; `nested`: a stage that keeps fewer keeps some
            of those that others keep; `shared`: the same groups in all stages, refitted for
            each. The last two store less. Not with the criterion `random`.
        granularity: what goes at once: `width` heads and neurons, `layers` a whole attention or
            FFN, `blocks` both together. `layers` and `blocks` need `optimal` or `evolutionary`.
        depth_rank: what whole layers or blocks are ranked by: `curve` their error when removed,
            `error` or `cosine` what they change of the residual stream.
        least_heads: that every attention of every stage keeps.
        least_neurons: that every FFN of every stage keeps.
        keep: patterns (`*` and `?`) of names of layers that are left whole.
        latency_batch: rows of a call for a latency budget.
        latency_table: file of layer timings to use instead of this device's own, which are
            measured once and kept in the user's cache.
        probe_samples: samples that measured errors are taken over (`quality`, search, sweep).
        search: of `allocation="evolutionary"`.

    Raises:
        ValueError: a field is out of range; the message names the field and the rule.
    """

    sparsity: float | str | None = None
    macs: float | str | None = None
    params: float | str | None = None
    size: float | str | None = None
    latency: float | str | None = None
    quality: float | str | None = None
    allocation: str = "optimal"
    stage_sparsity: tuple[float, ...] | None = None
    layer_sparsity: Mapping[str, tuple[float, ...]] | None = None
    stages: int | str | None = None
    boundaries: tuple[int, ...] | None = None
    bins: int = 10
    max_stages: int = 4
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
    weighting: str = "trajectory"
    choice: str = "separate"
    granularity: str = "width"
    depth_rank: str = "curve"
    least_heads: int = 0
    least_neurons: int = 0
    keep: tuple[str, ...] = ()
    latency_batch: int = 1
    latency_table: str | None = None
    probe_samples: int = 32
    search: SearchConfig = SearchConfig()

    def __post_init__(self) -> None:
        self._freeze_sequences()
        self._check_budget()
        self._check_choices()
        self._check_shares()
        self._check_counts()
        self._check_explicit()

    def _freeze_sequences(self) -> None:
        for name in ("stage_sparsity", "boundaries", "keep"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"PruneConfig: {name} must be a list, got {value!r}.")
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.search, Mapping):
            object.__setattr__(self, "search", SearchConfig(**self.search))
        if self.layer_sparsity is not None:
            frozen = {name: tuple(shares) for name, shares in self.layer_sparsity.items()}
            object.__setattr__(self, "layer_sparsity", frozen)

    @property
    def budget(self) -> Budget:
        """The one budget: what was given, or a sparsity of 0.3."""
        for unit in UNITS:
            value = getattr(self, unit)
            if value is not None:
                return Budget.parse(unit, value)
        return Budget("sparsity", DEFAULT_SPARSITY)

    @property
    def stage_count(self) -> int | str:
        """The number of stages asked for, `auto`, or the allocation's usual number."""
        if self.stages is not None:
            return self.stages
        return SEARCHED_STAGES if self.allocation == "evolutionary" else CLOSED_FORM_STAGES

    def _check_budget(self) -> None:
        given = [unit for unit in UNITS if getattr(self, unit) is not None]
        if len(given) > 1:
            raise ValueError(
                f"PruneConfig: a budget must be in one unit, got {' and '.join(given)}. "
                "Keep the one that matters most."
            )
        if given and self.allocation == "explicit":
            raise ValueError(
                f"PruneConfig: {given[0]} must be left out with allocation='explicit', which "
                f"states its shares, got {getattr(self, given[0])!r}."
            )
        if self.allocation == "evolutionary" and given and given[0] not in ("sparsity", "macs"):
            raise ValueError(
                f"PruneConfig: a budget must be a sparsity or macs with allocation 'evolutionary', "
                f"got {given[0]}. Find the plan that meets it by 'optimal', then search at its "
                "sparsity."
            )
        _ = self.budget

    def _check_choices(self) -> None:
        require_choices(
            self,
            {
                "allocation": ALLOCATIONS,
                "criterion": CRITERIA,
                "compensation": COMPENSATIONS,
                "weighting": WEIGHTINGS,
                "choice": CHOICES,
                "granularity": GRANULARITIES,
                "depth_rank": DEPTH_RANKS,
            },
        )
        whole = isinstance(self.stages, int) and not isinstance(self.stages, bool)
        if self.stages not in (None, "auto") and not (whole and int(self.stages) >= 1):
            raise ValueError(
                f"PruneConfig: stages must be a whole number of at least 1, or auto, "
                f"got {self.stages!r}."
            )
        if self.granularity != "width" and self.allocation not in ("optimal", "evolutionary"):
            raise ValueError(
                f"PruneConfig: allocation must be optimal or evolutionary with granularity "
                f"{self.granularity!r}, got {self.allocation!r}: shares do not fit whole layers."
            )
        if self.choice == "shared" and self.allocation in ("score", "explicit"):
            raise ValueError(
                "PruneConfig: allocation must be uniform, optimal or evolutionary with choice "
                f"'shared', got {self.allocation!r}: its shares differ from stage to stage."
            )
        if self.choice != "separate" and self.criterion == "random":
            raise ValueError(
                f"PruneConfig: criterion must not be random with choice {self.choice!r}."
            )

    def _check_shares(self) -> None:
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
        counts = (
            "steps", "samples", "batch_size", "round_to", "bins", "max_stages", "latency_batch",
            "probe_samples",
        )  # fmt: skip
        least = dict.fromkeys(counts, 1) | {"least_heads": 0, "least_neurons": 0}
        require_whole_numbers(self, least)
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
        for name in ("stage_sparsity", "boundaries", "keep"):
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
