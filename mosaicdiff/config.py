"""What the user asks for: one frozen, validated value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .allocation.budget import DEFAULT_SPARSITY, UNITS, Budget
from .config_checks import check_config
from .granularity import check_granularity, parse_pattern, removes_weights
from .search_config import SearchConfig
from .trajectory_config import TrajectoryConfig

#: Stages where none are asked for: those of Diff-ES for a search, of MosaicDiff otherwise.
SEARCHED_STAGES, CLOSED_FORM_STAGES = 10, 3
_SEQUENCES = ("stage_sparsity", "boundaries", "include", "exclude")


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
            searches from `optimal` on (`search`); `explicit` takes the two fields below. None:
            `uniform` where single weights go, `optimal` otherwise.
        stage_sparsity: one share for each stage, noisiest first.
        layer_sparsity: shares for single layers (or, where single weights go, linears), by
            pattern of their names; the last that matches counts. One for each stage, or one for
            all. Layers that none names take their stage's share.
        stages: 3 (early, middle, late by the closed form; fewer where one is empty), another
            number (stages of equal sampling steps; 1 is one network), or `auto` (boundaries
            from the data, up to `max_stages`). None: 10 for `evolutionary`, 1 where single
            weights go, 3 otherwise.
        boundaries: explicit train timesteps instead of the closed form: a timestep at or above a
            boundary belongs to the noisier side. Any number of stages.
        bins: of `stages="auto"`: how many runs of equal sampling steps are calibrated, whose
            edges may become boundaries.
        max_stages: of `stages="auto"`.
        threshold: M, the share of the largest score at which the middle stage begins. None: the
            schedule's usual one (`trajectory.schedule`).
        snr_weight: lambda, the weight of ln SNR in the score. None: the schedule's usual one.
        max_sparsity: the most that one stage may give (benchmarks.bench_quality cap).
        criterion: `obs`, or a baseline: `magnitude`, `wanda`, `random`; and `dsnot` where single
            weights go.
        compensation: `plain` least squares on what is kept, `affine` with a new bias, `none`.
            Where single weights go, `obs` is `plain` and the baselines are `none`.
        steps: sampling steps that the plan is made for.
        samples: calibration samples drawn for each stage.
        batch_size: calibration samples run at once; `auto`: as many as memory allows (see
            `inputs.batching.fitting_rows`).
        seed: of everything that is drawn.
        null_share: share of the calibration samples that carry the null condition, in [0, 1].
        damping: added to the Hessian's diagonal, relative to its mean.
        round_to: kept FFN neurons are a multiple of this (or all of them); `auto`: neurons and
            heads of what is worth its time on the device at hand, measured there for calls of
            `latency_batch` rows and kept in the user's cache.
        weighting: of the layers' errors in `optimal`: `raw`, by how much the denoiser's output
            depends on the layer's (`sensitivity`), or that times how much the final latents
            depend on the stage's outputs (`trajectory`).
        choice: `separate` groups in every stage; `nested`: a stage that keeps fewer keeps some
            of those that others keep; `shared`: the same groups in all stages, refitted for
            each. The last two store less. Not with the criterion `random`.
        granularity: what goes at once: `structured` heads and neurons, `layers` a whole
            attention or FFN, `blocks` both together; `unstructured` single weights, `N:M` (2:4)
            all but N of every M along a row: those leave shapes and dense time as they are.
            `layers` and `blocks` need `optimal` or `evolutionary`.
        depth_rank: what whole layers or blocks are ranked by: `curve` their error when removed,
            `error` or `cosine` what they change of the residual stream.
        shared_norms: what becomes of norms of queries and keys over all heads together (Wan, LTX,
            Sana 1.5): `exact` leaves them and the projections before them whole, and drops what
            they give of removed heads; `approximate` cuts them too, so that their statistic is of
            the kept heads alone (what it is less on average goes into the norm's weight):
            smaller and faster, with an error that the report says.
        least_heads: that every attention of every stage keeps.
        least_neurons: that every FFN of every stage keeps.
        include: patterns (`*` and `?`) of names of layers (or linears, where single weights go)
            that may be pruned; all where none is given.
        exclude: patterns of those that are left whole; wins over `include`.
        whole_ends: leave the first and the last block whole. None: where they have joint
            attention and groups go, as OBS-Diff does.
        activations: whose are seen: `noised` clean latents (MosaicDiff) or those of the pipeline
            along its `trajectory` (OBS-Diff), which needs no pictures.
        trajectory: of `activations="trajectory"`; its guidance scale and options also say how a
            pipeline encodes captions of images.
        packages: parts of the network, in its order, of which each is calibrated with those before
            it pruned; `auto`: as few as `memory` allows.
        memory: bytes that calibrating and pruning a package may take beside the model and its
            activations, e.g. `20GiB`.
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
    allocation: str = ""
    stage_sparsity: tuple[float, ...] | None = None
    layer_sparsity: Mapping[str, tuple[float, ...] | float] | None = None
    stages: int | str | None = None
    boundaries: tuple[int, ...] | None = None
    bins: int = 10
    max_stages: int = 4
    threshold: float | None = None
    snr_weight: float | None = None
    max_sparsity: float = 0.95
    criterion: str = "obs"
    compensation: str = "plain"
    steps: int = 50
    samples: int = 512
    batch_size: int | str = 64
    seed: int = 0
    null_share: float = 0.1
    damping: float = 0.01
    round_to: int | str = 1
    weighting: str = "trajectory"
    choice: str = "separate"
    granularity: str = "structured"
    depth_rank: str = "curve"
    shared_norms: str = "exact"
    least_heads: int = 0
    least_neurons: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    whole_ends: bool | None = None
    activations: str = "noised"
    trajectory: TrajectoryConfig = TrajectoryConfig()
    packages: int | str = 1
    memory: int | str | None = None
    latency_batch: int = 1
    latency_table: str | None = None
    probe_samples: int = 32
    search: SearchConfig = SearchConfig()

    def __post_init__(self) -> None:
        self._freeze()
        check_config(self)

    def _freeze(self) -> None:
        for name in _SEQUENCES:
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"PruneConfig: {name} must be a list, got {value!r}.")
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        for name, kind in (("search", SearchConfig), ("trajectory", TrajectoryConfig)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, kind(**value))
        if self.layer_sparsity is not None:
            frozen = {
                name: shares if isinstance(shares, (int, float)) else tuple(shares)
                for name, shares in self.layer_sparsity.items()
            }
            object.__setattr__(self, "layer_sparsity", frozen)
        check_granularity(self.granularity)
        if not self.allocation:
            usual = "uniform" if self.removes_weights else "optimal"
            object.__setattr__(self, "allocation", usual)

    @property
    def budget(self) -> Budget:
        """The one budget: what was given, or a sparsity of 0.3."""
        for unit in UNITS:
            value = getattr(self, unit)
            if value is not None:
                return Budget.parse(unit, value)
        pattern = parse_pattern(self.granularity)
        if pattern is not None:
            return Budget("sparsity", 1 - pattern[0] / pattern[1])
        return Budget("sparsity", DEFAULT_SPARSITY)

    @property
    def stage_count(self) -> int | str:
        """The number of stages asked for, `auto`, or the allocation's usual number."""
        if self.stages is not None:
            return self.stages
        if self.removes_weights:
            return 1
        return SEARCHED_STAGES if self.allocation == "evolutionary" else CLOSED_FORM_STAGES

    @property
    def rows_at_once(self) -> int:
        """The batch size, once it is chosen."""
        if isinstance(self.batch_size, str):
            raise ValueError(
                f"PruneConfig: batch_size must be a number here, got {self.batch_size!r}. `prune` "
                "and `calibrate` choose one for the model; elsewhere give it."
            )
        return self.batch_size

    @property
    def removes_weights(self) -> bool:
        """Whether single weights go, so that layers keep their shape."""
        return removes_weights(self.granularity)

    @property
    def memory_bytes(self) -> int | None:
        """What a package may take, in bytes."""
        if self.memory is None:
            return None
        try:
            text = f"{self.memory}B" if isinstance(self.memory, int) else self.memory
            parsed = Budget.parse("size", text)
        except ValueError:
            parsed = None
        if parsed is None or parsed.relative or parsed.value < 1:
            raise ValueError(
                "PruneConfig: memory must be such as 20GiB, 500MB or a number of bytes, "
                f"got {self.memory!r}."
            )
        return int(parsed.value)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold; `from_dict` is the inverse."""
        values = asdict(self)
        for name in _SEQUENCES:
            if values[name] is not None:
                values[name] = list(values[name])
        if self.layer_sparsity is not None:
            values["layer_sparsity"] = {
                k: v if isinstance(v, (int, float)) else list(v)
                for k, v in self.layer_sparsity.items()
            }
        values["trajectory"] = self.trajectory.to_dict(self.steps)
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
