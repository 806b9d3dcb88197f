"""From pruned linears to the staged denoiser they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..adapters import Adapter
from ..config import PruneConfig
from ..groups import Denoiser
from ..runtime import StagedDenoiser
from ..stage_state import MaskedState, StageInfo
from ..trajectory.stages import Division
from .weights import WeightSolution


def assemble_weights(
    adapter: Adapter,
    base: Denoiser,
    division: Division,
    steps: Sequence[int],
    config: PruneConfig,
    solutions: Sequence[Mapping[str, WeightSolution]],
) -> StagedDenoiser:
    """Build the staged denoiser of pruned linears around a base, whose other tensors it shares.

    Stages whose weights came out equal share them.

    Args:
        steps: sampling steps of each stage.
        solutions: of each stage, by name of the linear; a linear that is not named stays whole.

    Raises:
        ValueError: there is not one entry a stage.
    """
    for name, given in (("steps", steps), ("solutions", solutions)):
        if len(given) != len(division):
            raise ValueError(
                f"assemble_weights: {name} must be one for each of {len(division)} stages, "
                f"got {len(given)}."
            )
    states: list[dict[str, MaskedState]] = []
    for solved in solutions:
        states.append({name: _shared(name, s, states) for name, s in solved.items()})
    info = StageInfo(
        base_class=adapter.denoiser_class,
        base_config={k: v for k, v in base.config.items() if not k.startswith("_")},
        division=division,
        layers=adapter.layers(base, config.shared_norms),
        kept=[{} for _ in solutions],
        steps=list(steps),
        prune_config=config.to_dict(),
    )
    return StagedDenoiser.assemble(base, info, states)


def _shared(
    name: str, solution: WeightSolution, earlier: Sequence[Mapping[str, MaskedState]]
) -> MaskedState:
    """Return an earlier stage's state of a linear where it is the same, or one of its own."""
    for states in earlier:
        other = states.get(name)
        if (
            other is not None
            and torch.equal(other.mask, solution.mask)
            and torch.equal(other.weight, solution.weight)
        ):
            return other
    return MaskedState(solution.mask, solution.weight)
