"""Evolve level vectors of equal sum. Pure functions of numbers, and one file to go on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from ..checks import require_whole_numbers
from .state import Genome, State, load, save

#: Draws for a genome not seen before, before one is given up; chosen.
_DRAWS = 20
_LEAST = {
    "population": 1, "offspring": 1, "survivors": 1, "generations": 0,
    "max_levels": 1, "switches": 1, "batch": 1, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class EvolutionSettings:
    """How the search goes about it; whole numbers all.

    Args:
        population: genomes of the initial population: all seeds, filled up with random ones.
        offspring: new genomes of a generation.
        survivors: best genomes kept after each generation, the parents of the next.
        generations: generations after the initial population (SDXL in the source: 100).
        max_levels: most levels a level switch moves from one gene to another (SDXL: 3).
        switches: most level switches of a mutation; the smaller of two draws from 1 to this.
        batch: genomes evaluated, and recorded, at once; chosen.
        seed: of the random numbers; chosen.

    Raises:
        ValueError: a setting is not a whole number, or too small.

    Source: Diff-ES (arXiv 2603.05105), its published code: 16 offspring, 4 survivors, an initial
    population of both together, mutations of up to 5 switches; 50 generations and 5 levels in its
    DiT example. There the initial population counts as the first generation, here it does not.
    """

    population: int = 20
    offspring: int = 16
    survivors: int = 4
    generations: int = 50
    max_levels: int = 5
    switches: int = 5
    batch: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no search could use."""
        require_whole_numbers(self, _LEAST, " Leave it out for the default.")


@dataclass(frozen=True)
class Progress:
    """Where a search stands after a batch.

    Args:
        generation: the one at work; 0 is the initial population.
        generations: how many there will be.
        evaluations: genomes evaluated so far, in all runs.
        fitness: least error so far.
        seconds: spent so far, in all runs.
        done: genomes of this generation evaluated.
        total: genomes of this generation.
    """

    generation: int
    generations: int
    evaluations: int
    fitness: float
    seconds: float
    done: int
    total: int


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Args:
        best: genome of least error of all evaluated, the first of equals.
        fitness: its error.
        generations: whole generations done.
        evaluations: genomes evaluated, in all runs.
        seconds: spent, in all runs.
        history: least error after each whole generation; element 0 is of the initial population,
            or of the part evaluated where the time ran out within it, so it is never empty.
        complete: False where the time ran out before all generations were done.
    """

    best: Genome
    fitness: float
    generations: int
    evaluations: int
    seconds: float
    history: tuple[float, ...]
    complete: bool


def evolve(
    limits: Sequence[int],
    seeds: Sequence[Genome],
    evaluate: Callable[[Sequence[Genome]], Sequence[float]],
    settings: EvolutionSettings,
    *,
    seconds: float | None = None,
    state: Path | None = None,
    fingerprint: str = "",
    advance: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Search the genomes of one sum, from 0 to the limits, for the least error.

    Every generation mutates survivors by level switches, evaluates the genomes not seen before,
    and keeps the best of parents and offspring: the best never gets worse, and no genome is
    evaluated twice. A search killed at any moment and started again with the same arguments and
    `state` ends as if it had not been, given an `evaluate` that always gives the same errors.
    A state that has as many generations as asked for, or more, is returned as it is.

    Args:
        limits: highest level of each gene; the lowest is 0.
        seeds: genomes to start from, at least one, all of one sum.
        evaluate: finite errors (lower is better) of at most `settings.batch` new genomes.
        settings: see `EvolutionSettings`.
        seconds: time to spend in all runs, looked at before each batch; None for no end. The
            seeds are evaluated whatever it says, and a batch begun is finished.
        state: file to go on from, written after every batch; its folder is made.
        fingerprint: of all that the error depends on.
        advance: told after every batch.

    Raises:
        ValueError: limits or seeds that are no such thing, an error that is not finite, or a
            state of another search.

    Source: Diff-ES (arXiv 2603.05105): level switches, elitist selection, one fidelity here.
    """
    limits, seeds = _checked(limits, seeds)
    if seconds is not None and not seconds >= 0:
        raise ValueError(
            f"evolve: seconds must be at least 0, got {seconds}. Pass None for no end."
        )
    identity = {
        "fingerprint": fingerprint,
        "limits": list(limits),
        "seeds": [list(seed) for seed in seeds],
        "settings": {k: v for k, v in asdict(settings).items() if k != "generations"},
    }
    now = load(state, identity) if state is not None and state.exists() else None
    if now is None:
        random = np.random.default_rng(settings.seed).bit_generator.state
        now = State(dict(random), 0, [], [], 0.0, {})
    before, started = now.seconds, monotonic()

    def record() -> None:
        now.seconds = before + monotonic() - started
        if state is not None:
            save(state, identity, now)

    def evaluated(genomes: list[Genome]) -> bool:
        """Fill the memo; return False where the time ran out first."""
        told = False
        for start in range(0, len(genomes), settings.batch):
            # A resumed generation is cut into the batches it was cut into before.
            part = genomes[start : start + settings.batch]
            batch = [genome for genome in part if genome not in now.memo]
            if not batch:
                continue
            spent = before + monotonic() - started
            if seconds is not None and spent >= seconds and not set(batch) & set(seeds):
                return False
            now.memo.update(zip(batch, _errors(evaluate, batch), strict=True))
            record()
            report(start + len(part), len(genomes))
            told = start + len(part) == len(genomes)
        if not told:
            report(len(genomes), len(genomes))
        return True

    def report(done: int, total: int) -> None:
        least = min(now.memo.values())
        generation = len(now.history)
        advance(
            Progress(
                generation, settings.generations, len(now.memo), least, now.seconds, done, total
            )
        )

    if state is not None:
        # A place that cannot be written to is better known before the first evaluation.
        state.parent.mkdir(parents=True, exist_ok=True)
        record()
    complete = True
    while complete and len(now.history) <= settings.generations:
        rng = np.random.default_rng()
        rng.bit_generator.state = now.random
        # Genomes of an interrupted generation are in the memo, but were not when it was drawn.
        seen = set(list(now.memo)[: now.known])
        if now.history:
            genomes = _offspring(now.parents, limits, seen, settings, rng)
        else:
            genomes = _initial(seeds, limits, settings, rng)
        complete = evaluated(genomes)
        if complete:
            # Sorting is stable, so of equals the first evaluated stays.
            pool = sorted([*now.parents, *genomes], key=lambda genome: now.memo[genome])
            now.parents = pool[: settings.survivors]
            now.history.append(now.memo[pool[0]])
            now.random, now.known = dict(rng.bit_generator.state), len(now.memo)
            record()
    best = min(now.memo, key=lambda genome: now.memo[genome])
    return Outcome(
        best=best,
        fitness=now.memo[best],
        generations=max(0, len(now.history) - 1),
        evaluations=len(now.memo),
        seconds=now.seconds,
        history=tuple(now.history) or (now.memo[best],),
        complete=complete,
    )


def _checked(
    limits: Sequence[int], seeds: Sequence[Genome]
) -> tuple[tuple[int, ...], list[Genome]]:
    """Return limits and seeds as plain whole numbers, seeds without repeats."""
    limits = tuple(limits)
    for limit in limits:
        if not _whole(limit) or limit < 0:
            raise ValueError(
                f"evolve: limits must be whole numbers of at least 0, got {limit!r}. "
                "Give every gene its highest level."
            )
    if not seeds:
        raise ValueError(
            "evolve: seeds must be at least one genome, got none. "
            "Give one whose sum is the budget, such as equal levels."
        )
    for seed in seeds:
        fits = len(seed) == len(limits) and all(
            _whole(level) and 0 <= level <= limit for level, limit in zip(seed, limits, strict=True)
        )
        if not fits:
            raise ValueError(
                f"evolve: seeds must be whole levels from 0 to the limits {limits}, "
                f"got {tuple(seed)}. Clip it, or raise the limits."
            )
        if sum(seed) != sum(seeds[0]):
            raise ValueError(
                f"evolve: seeds must have one sum, {sum(seeds[0])} as the first, got {sum(seed)} "
                f"of {tuple(seed)}. Move levels until it has."
            )
    plain = [tuple(int(level) for level in seed) for seed in seeds]
    return tuple(int(limit) for limit in limits), list(dict.fromkeys(plain))


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _errors(
    evaluate: Callable[[Sequence[Genome]], Sequence[float]], batch: list[Genome]
) -> list[float]:
    """Evaluate a batch and refuse what cannot be compared."""
    errors = [float(error) for error in evaluate(tuple(batch))]
    if len(errors) != len(batch):
        raise ValueError(
            f"evolve: evaluate must return one error for each of {len(batch)} genomes, "
            f"got {len(errors)}. Return them in the order of the genomes."
        )
    for genome, error in zip(batch, errors, strict=True):
        if not math.isfinite(error):
            raise ValueError(
                f"evolve: evaluate must return finite errors, got {error} for genome {genome}. "
                "Lower the limits if so much cannot be removed, or look at that one alone."
            )
    return errors


def _initial(
    seeds: list[Genome],
    limits: tuple[int, ...],
    settings: EvolutionSettings,
    rng: np.random.Generator,
) -> list[Genome]:
    """Return the seeds, filled up with random genomes of the same sum."""
    genomes = list(seeds)
    for _ in range(settings.population - len(seeds)):
        for _ in range(_DRAWS):
            genome = _random(limits, sum(seeds[0]), rng)
            if genome not in genomes:
                genomes.append(genome)
                break
    return genomes


def _random(limits: tuple[int, ...], total: int, rng: np.random.Generator) -> Genome:
    """Share `total` levels out by random weights; what a full gene cannot take goes on."""
    weights = np.maximum(rng.exponential(size=len(limits)), 1e-9)
    room, left = np.asarray(limits, dtype=np.int64), total
    while left:
        willing = weights * (room > 0)
        taken = np.minimum(room, np.floor(left * willing / willing.sum()).astype(np.int64))
        if not taken.any():
            # Fewer levels than genes are left: one each to genes drawn at random.
            taken[rng.choice(np.flatnonzero(room))] = 1
        room, left = room - taken, left - int(taken.sum())
    return tuple(int(limit - r) for limit, r in zip(limits, room, strict=True))


def _offspring(
    parents: list[Genome],
    limits: tuple[int, ...],
    seen: set[Genome],
    settings: EvolutionSettings,
    rng: np.random.Generator,
) -> list[Genome]:
    """Mutate parents drawn at random into genomes not seen before; fewer where none are left."""
    children: dict[Genome, None] = {}
    for _ in range(settings.offspring):
        parent = parents[int(rng.integers(len(parents)))]
        for _ in range(_DRAWS):
            child = _mutated(parent, limits, settings, rng)
            if child not in seen and child not in children:
                children[child] = None
                break
    return list(children)


def _mutated(
    parent: Genome, limits: tuple[int, ...], settings: EvolutionSettings, rng: np.random.Generator
) -> Genome:
    """Switch levels a few times: raise one gene, lower another by as much."""
    levels = list(parent)
    for _ in range(int(rng.integers(1, settings.switches + 1, size=2).min())):
        roomy = [i for i, limit in enumerate(limits) if levels[i] < limit]
        givers = [i for i, level in enumerate(levels) if level and roomy not in ([], [i])]
        if not givers:
            break
        giver = givers[int(rng.integers(len(givers)))]
        takers = [i for i in roomy if i != giver]
        taker = takers[int(rng.integers(len(takers)))]
        moved = int(rng.integers(1, settings.max_levels + 1))
        moved = min(moved, levels[giver], limits[taker] - levels[taker])
        levels[giver] -= moved
        levels[taker] += moved
    return tuple(levels)
