"""Which linears lose single weights, and how many: from a configuration, before any work."""

from __future__ import annotations

from collections.abc import Sequence

from .adapters import Adapter
from .allocation.planning import Frame, layer_shares, shares_of_stages
from .config import PruneConfig
from .granularity import parse_pattern
from .groups import Denoiser, WeightTarget
from .patterns import is_chosen


def choose_targets(
    adapter: Adapter, denoiser: Denoiser, config: PruneConfig
) -> tuple[WeightTarget, ...]:
    """List the linears that a configuration prunes, in network order.

    Raises:
        ValueError: none is left, or a row of one is no multiple of M.
    """
    targets = adapter.targets(denoiser)
    chosen = tuple(t for t in targets if is_chosen(t.name, config.include, config.exclude))
    if not chosen:
        raise ValueError(
            f"prune: include and exclude must leave some of the {len(targets)} linears of the "
            "blocks, but they leave none. Exclude less."
        )
    pattern = parse_pattern(config.granularity)
    if pattern is not None:
        for target in chosen:
            n = denoiser.get_submodule(target.name).in_features
            if n % pattern[1]:
                raise ValueError(
                    f"prune: granularity {config.granularity} must divide the rows of every "
                    f"linear, but {target.name} has {n} columns. Exclude it, or use another N:M."
                )
    return chosen


def target_shares(
    targets: Sequence[WeightTarget], frame: Frame, config: PruneConfig
) -> list[list[float]]:
    """Return the share of its weights that each linear loses in each stage.

    `uniform` and `score` give the stages what they give them in `planning.share_plan`; a linear
    has its stage's share, or its own (`layer_sparsity`).

    Raises:
        ValueError: the sparsity cannot be met under the cap, or shares do not fit the stages.
    """
    shares = shares_of_stages(frame, config, config.budget.value, config.max_sparsity)
    names = [target.name for target in targets]
    return [layer_shares(names, share, k, len(shares), config) for k, share in enumerate(shares)]
