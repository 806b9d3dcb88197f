"""What the user asks of a search: one frozen, validated value."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .checks import require_choices, require_whole_numbers

#: And `iqa:NAME`, a metric of the package pyiqa such as `iqa:topiq_nr`.
FITNESSES = ("latent", "trajectory", "ssim")
GENES = ("stages", "layers")
WITHIN = ("optimal", "uniform")
STARTS = ("optimal", "score")


@dataclass(frozen=True)
class SearchConfig:
    """Say how `allocation="evolutionary"` searches.

    Args:
        genes: `stages` gives each stage a level, as Diff-ES does, and lets the layers of a stage
            share it as `within` says; `layers` gives each layer of each stage its own.
        within: of `genes="stages"`: `optimal`, or `uniform` as in Diff-ES.
        start: what the first population holds: `optimal`, `score` or both.
        fitness: to the dense model's run from the same noise: `latent` is the squared error of
            the final latents, `trajectory` its mean over the steps, `ssim` 1 - the structural
            similarity of the pictures, `iqa:NAME` a quality metric of pyiqa on the pictures.
        seconds: wall clock of the search; None is as long as `generations` take.
        generations: at most.
        population: how many the first generation holds, random ones filled up.
        offspring: of a generation.
        survivors: of a generation.
        levels: into which what may go is cut.
        max_levels: that one mutation moves from a gene to another, at most.

    Raises:
        ValueError: a field is out of range; the message names the field and the rule.

    Source: Diff-ES (arXiv 2603.05105); the numbers are those of its published code for DiT, the
    levels are ours.
    """

    genes: str = "stages"
    within: str = "optimal"
    start: tuple[str, ...] = STARTS
    fitness: str = "latent"
    seconds: float | None = None
    generations: int = 50
    population: int = 20
    offspring: int = 16
    survivors: int = 4
    levels: int = 40
    max_levels: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", tuple(self.start))
        require_choices(self, {"genes": GENES, "within": WITHIN})
        if self.fitness not in FITNESSES and not self.fitness.startswith("iqa:"):
            raise ValueError(
                f"SearchConfig: fitness must be one of {', '.join(FITNESSES)} or iqa:NAME, "
                f"got {self.fitness!r}."
            )
        if not self.start or any(start not in STARTS for start in self.start):
            raise ValueError(
                f"SearchConfig: start must name some of {', '.join(STARTS)}, got {self.start}."
            )
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(
                f"SearchConfig: seconds must be more than 0, got {self.seconds}. "
                "Leave it out to search for all generations."
            )
        least = {
            "generations": 0, "population": 1, "offspring": 1, "survivors": 1, "levels": 2,
            "max_levels": 1,
        }  # fmt: skip
        require_whole_numbers(self, least)
