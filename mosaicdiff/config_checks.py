"""Whether the fields of a `PruneConfig` are in range and fit together."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from .allocation.budget import UNITS
from .checks import require_choices, require_whole_numbers
from .granularity import parse_pattern
from .trajectory_config import TrajectoryConfig

if TYPE_CHECKING:
    from .config import PruneConfig

CRITERIA = ("obs", "magnitude", "wanda", "dsnot", "random")
COMPENSATIONS = ("plain", "affine", "none")
ALLOCATIONS = ("score", "uniform", "optimal", "evolutionary", "explicit")
WEIGHTINGS = ("raw", "sensitivity", "trajectory")
CHOICES = ("separate", "nested", "shared")
ACTIVATIONS = ("noised", "trajectory")
DEPTH_RANKS = ("curve", "error", "cosine")
SHARED_NORMS = ("exact", "approximate")


def check_config(config: PruneConfig) -> None:
    """Refuse a configuration that cannot be meant.

    Raises:
        ValueError: names the field and the rule.
    """
    _check_budget(config)
    _check_choices(config)
    _check_activations(config)
    _check_weights(config)
    _check_packages(config)
    _check_shares(config)
    _check_counts(config)
    _check_explicit(config)


def _check_budget(config: PruneConfig) -> None:
    given = [unit for unit in UNITS if getattr(config, unit) is not None]
    if len(given) > 1:
        raise ValueError(
            f"PruneConfig: a budget must be in one unit, got {' and '.join(given)}. "
            "Keep the one that matters most."
        )
    if given and config.allocation == "explicit":
        raise ValueError(
            f"PruneConfig: {given[0]} must be left out with allocation='explicit', which "
            f"states its shares, got {getattr(config, given[0])!r}."
        )
    if config.allocation == "evolutionary" and given and given[0] not in ("sparsity", "macs"):
        raise ValueError(
            f"PruneConfig: a budget must be a sparsity or macs with allocation 'evolutionary', "
            f"got {given[0]}. Find the plan that meets it by 'optimal', then search at its "
            "sparsity."
        )
    _ = config.budget


def _check_choices(config: PruneConfig) -> None:
    require_choices(
        config,
        {
            "allocation": ALLOCATIONS,
            "criterion": CRITERIA,
            "compensation": COMPENSATIONS,
            "weighting": WEIGHTINGS,
            "choice": CHOICES,
            "activations": ACTIVATIONS,
            "depth_rank": DEPTH_RANKS,
            "shared_norms": SHARED_NORMS,
        },
    )
    whole = isinstance(config.stages, int) and not isinstance(config.stages, bool)
    if config.stages not in (None, "auto") and not (whole and int(config.stages) >= 1):
        raise ValueError(
            f"PruneConfig: stages must be a whole number of at least 1, or auto, "
            f"got {config.stages!r}."
        )
    at_once = config.granularity in ("layers", "blocks")
    if at_once and config.allocation not in ("optimal", "evolutionary"):
        raise ValueError(
            f"PruneConfig: allocation must be optimal or evolutionary with granularity "
            f"{config.granularity!r}, got {config.allocation!r}: shares do not fit whole layers."
        )
    if config.choice == "shared" and config.allocation in ("score", "explicit"):
        raise ValueError(
            "PruneConfig: allocation must be uniform, optimal or evolutionary with choice "
            f"'shared', got {config.allocation!r}: its shares differ from stage to stage."
        )
    if config.choice != "separate" and config.criterion == "random":
        raise ValueError(
            f"PruneConfig: criterion must not be random with choice {config.choice!r}."
        )


def _check_activations(config: PruneConfig) -> None:
    # How the pipeline is called matters to texts that it encodes too.
    called = replace(config.trajectory, guidance_scale=None, options={})
    if config.activations == "noised" and called != TrajectoryConfig():
        raise ValueError(
            "PruneConfig: trajectory must be left out with activations 'noised', which samples "
            f"nothing, got {config.trajectory.to_dict(config.steps)}. Ask for activations "
            "'trajectory' (--activations trajectory). Only guidance_scale and options serve "
            "images with captions too."
        )


def _check_weights(config: PruneConfig) -> None:
    """Hold what only groups, or only single weights, can have."""
    if not config.removes_weights:
        if config.criterion == "dsnot":
            raise ValueError(
                "PruneConfig: criterion dsnot must go with granularity unstructured or N:M, got "
                f"{config.granularity!r}. It swaps single weights."
            )
        return
    if config.allocation not in ("uniform", "score", "explicit"):
        raise ValueError(
            f"PruneConfig: allocation must be uniform, score or explicit with granularity "
            f"{config.granularity!r}, got {config.allocation!r}: single weights have no curves."
        )
    if config.budget.unit != "sparsity":
        raise ValueError(
            f"PruneConfig: a budget must be a sparsity with granularity {config.granularity!r}, "
            f"got {config.budget}. Layers keep their shapes, so dense MACs and time stay."
        )
    wanted = "plain" if config.criterion == "obs" else "none"
    if config.compensation != wanted:
        raise ValueError(
            f"PruneConfig: compensation must be {wanted} with criterion {config.criterion} and "
            f"granularity {config.granularity!r}, got {config.compensation!r}. Only obs "
            "compensates single weights, and always does."
        )
    usual = {
        "choice": "separate", "least_heads": 0, "least_neurons": 0, "round_to": 1,
        "shared_norms": "exact",
    }  # fmt: skip
    for name, value in usual.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"PruneConfig: {name} must be left out with granularity {config.granularity!r}, "
                f"got {getattr(config, name)!r}. Groups stay."
            )
    if config.stages == "auto":
        raise ValueError(
            "PruneConfig: stages must not be auto where single weights go. Name timesteps."
        )
    pattern = parse_pattern(config.granularity)
    if pattern is not None:
        fixed = config.sparsity is not None or config.layer_sparsity is not None
        if config.allocation != "uniform" or fixed:
            raise ValueError(
                f"PruneConfig: granularity {config.granularity} removes "
                f"{1 - pattern[0] / pattern[1]:.0%} everywhere: sparsity and layer_sparsity must "
                "be left out and allocation uniform. Leave linears whole by exclude."
            )


def _check_packages(config: PruneConfig) -> None:
    whole = isinstance(config.packages, int) and not isinstance(config.packages, bool)
    if config.packages != "auto" and not (whole and int(config.packages) >= 1):
        raise ValueError(
            "PruneConfig: packages must be a whole number of at least 1, or auto, "
            f"got {config.packages!r}."
        )
    if config.packages == "auto" and config.memory is None:
        raise ValueError(
            "PruneConfig: memory must be given with packages='auto', got None. "
            "It says what a package may take, e.g. 20GiB."
        )
    _ = config.memory_bytes
    name = measured_at_once(config)
    if name is not None and (config.packages != 1 or config.memory is not None):
        raise ValueError(
            f"PruneConfig: packages must be 1 and memory None with {name}="
            f"{getattr(config, name)!r}, got {config.packages!r} and {config.memory!r}: it "
            "measures the whole network at once."
        )


def measured_at_once(config: PruneConfig) -> str | None:
    """Name the field that needs the statistics of all layers at once, if one does."""
    at_once = {
        "allocation": config.allocation == "evolutionary",
        "stages": config.stage_count == "auto",
        "quality": config.quality is not None,
        "latency": config.latency is not None,
    }
    return next((name for name, needed in at_once.items() if needed), None)


def _check_shares(config: PruneConfig) -> None:
    for share in config.stage_sparsity or ():
        _check_share("stage_sparsity", share, closed=True)
    for name, shares in (config.layer_sparsity or {}).items():
        for share in (shares,) if isinstance(shares, (int, float)) else shares:
            _check_share(f"layer_sparsity[{name!r}]", share, closed=True)
    if not 0 < config.max_sparsity <= 1:
        raise ValueError(f"PruneConfig: max_sparsity must be in (0, 1], got {config.max_sparsity}.")
    if config.threshold is not None and not 0 < config.threshold < 1:
        raise ValueError(f"PruneConfig: threshold must be in (0, 1), got {config.threshold}.")
    weight = config.snr_weight
    if weight is not None and not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"PruneConfig: snr_weight must be finite and not negative, got {weight}.")
    if not 0 <= config.null_share <= 1:
        raise ValueError(f"PruneConfig: null_share must be in [0, 1], got {config.null_share}.")
    if not (math.isfinite(config.damping) and config.damping >= 0):
        raise ValueError(
            f"PruneConfig: damping must be finite and not negative, got {config.damping}."
        )


def _check_counts(config: PruneConfig) -> None:
    counts = (
        "steps", "samples", "bins", "max_stages", "latency_batch",
        "probe_samples",
    )  # fmt: skip
    least = dict.fromkeys(counts, 1) | {"least_heads": 0, "least_neurons": 0}
    for name in ("batch_size", "round_to"):
        if getattr(config, name) != "auto":
            least[name] = 1
            if isinstance(getattr(config, name), str):
                raise ValueError(
                    f"PruneConfig: {name} must be a whole number or 'auto', got "
                    f"{getattr(config, name)!r}."
                )
    require_whole_numbers(config, least)
    if not isinstance(config.seed, int) or config.seed < 0:
        raise ValueError(
            f"PruneConfig: seed must be a whole number, not negative, got {config.seed!r}."
        )
    if config.boundaries is not None and (
        not config.boundaries
        or any(not isinstance(b, int) or b < 1 for b in config.boundaries)
        or len(set(config.boundaries)) != len(config.boundaries)
    ):
        raise ValueError(
            "PruneConfig: boundaries must be distinct whole timesteps of at least 1, "
            f"got {config.boundaries}."
        )


def _check_explicit(config: PruneConfig) -> None:
    stated = config.stage_sparsity is not None or (
        config.layer_sparsity is not None and not config.removes_weights
    )
    if config.allocation == "explicit" and config.stage_sparsity is None:
        raise ValueError(
            "PruneConfig: stage_sparsity must be given with allocation='explicit', got None. "
            "Give one share for each stage, noisiest first."
        )
    if stated and config.allocation != "explicit":
        raise ValueError(
            "PruneConfig: allocation must be 'explicit' with stage_sparsity or "
            f"layer_sparsity, got {config.allocation!r}."
        )


def _check_share(name: str, share: float, closed: bool = False) -> None:
    above = share > 1 if closed else share >= 1
    if not isinstance(share, (int, float)) or math.isnan(share) or share < 0 or above:
        raise ValueError(
            f"PruneConfig: {name} must be in [0, 1{']' if closed else ')'}, got {share}. "
            "It is a share of the prunable MACs, e.g. 0.3."
        )
