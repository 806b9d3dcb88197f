"""Search over how much every stage gives up: numbers in, numbers out."""

from __future__ import annotations

from .evolution import EvolutionSettings, Genome, Outcome, Progress, evolve

__all__ = ["EvolutionSettings", "Genome", "Outcome", "Progress", "evolve"]
