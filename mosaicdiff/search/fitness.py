"""Search plans by what the pruned denoiser does to the trajectory."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..allocation.allocator import Allocator
from ..allocation.planning import PrunePlan
from ..evaluate.pictures import decode_latents, picture_metric, ssim
from ..request import Job
from ..solving.fit import Fitter
from ..trajectory.probe import Probe, RunState, latent_error
from .evolution import EvolutionSettings, Genome, Progress, evolve
from .genes import Genetics

#: Runs up to a stage's end that are kept for candidates that begin alike.
_PREFIXES = 128
#: Solved layers that are kept for candidates to come.
_REMEMBER_BYTES = 2 << 30


class TrajectoryFitness:
    """Score plans against the dense denoiser's run from the same noise; lower is better.

    A candidate is sampled from the end of the longest beginning it shares with one before it.

    Args:
        probe: noises and conditions.
        fitter: builds the sub-networks.
        kind: see `SearchConfig.fitness`.
        vae: decodes latents, for scores of pictures.
    """

    def __init__(self, probe: Probe, fitter: Fitter, kind: str, vae: Any = None) -> None:
        self._probe, self._fitter, self._kind, self._vae = probe, fitter, kind, vae
        self._visit = kind == "trajectory"
        self._prefixes: OrderedDict[tuple, RunState] = OrderedDict()
        self._dense_pictures: torch.Tensor | None = None
        self._metric: Callable[[torch.Tensor], float] | None = None
        if kind not in ("latent", "trajectory"):
            if vae is None:
                raise ValueError(
                    f"search: fitness must be latent or trajectory with a bare denoiser, got "
                    f"{kind!r}: there is nothing to make pictures with."
                )
            if kind.startswith("iqa:"):
                self._metric = picture_metric(kind.removeprefix("iqa:"))

    def __call__(self, plan: PrunePlan) -> float:
        """Return the error of a plan."""
        state = self._probe.start()
        for k, count in enumerate(plan.steps):
            key = plan.removed[: k + 1]
            if key in self._prefixes:
                self._prefixes.move_to_end(key)
                state = self._prefixes[key]
                continue
            network = self._fitter.network(k, plan.removed[k])
            state = self._probe.advance(state, network, count, self._visit)
            self._prefixes[key] = state
            while len(self._prefixes) > _PREFIXES:
                self._prefixes.popitem(last=False)
        return self._score(state)

    def _score(self, state: RunState) -> float:
        dense = self._probe.dense(self._visit)
        if self._kind == "latent":
            return latent_error(state.latents, dense.latents)
        if self._kind == "trajectory":
            pairs = zip(state.visited, dense.visited, strict=True)
            return sum(latent_error(a, b) for a, b in pairs) / len(self._probe)
        pictures = decode_latents(self._vae, state.latents)
        if self._metric is not None:
            return self._metric(pictures)
        if self._dense_pictures is None:
            self._dense_pictures = decode_latents(self._vae, dense.latents)
        return 1.0 - ssim(pictures, self._dense_pictures)


def search_plan(
    job: Job,
    allocator: Allocator,
    fitter: Fitter,
    probe: Probe,
    tell: Callable[[str, int, int], None],
    state: Path | None = None,
) -> tuple[PrunePlan, dict[str, Any]]:
    """Evolve plans that cost the same, and return the best and how it was found.

    Raises:
        ValueError: the state on disk is of another search.

    Source: Diff-ES (arXiv 2603.05105); levels of equal cost, seeds from `optimal`, candidates
    from trajectories and the sharing of beginnings are ours.
    """
    budget, search = job.config.budget, job.config.search
    fitter.remember(_REMEMBER_BYTES)
    start = allocator.meet(budget, "optimal")
    genetics = Genetics(allocator, start, budget.unit)
    vae = getattr(job.pipeline, "vae", None)
    fitness = TrajectoryFitness(probe, fitter, search.fitness, vae)
    scores: dict[tuple, float] = {}

    def evaluate(genomes: Sequence[Genome]) -> list[float]:
        errors = []
        for genome in genomes:
            plan = genetics.decode(genome)
            if plan.removed not in scores:
                scores[plan.removed] = fitness(plan)
            errors.append(scores[plan.removed])
        return errors

    def advance(progress: Progress) -> None:
        shown = f"search {progress.generation}/{progress.generations}, best {progress.fitness:.4g}"
        if search.seconds is None:
            per = progress.total or 1
            done = progress.generation * per + progress.done
            tell(shown, done, (progress.generations + 1) * per)
        else:
            tell(shown, int(10 * min(progress.seconds, search.seconds)), int(10 * search.seconds))

    settings = EvolutionSettings(
        population=search.population,
        offspring=search.offspring,
        survivors=search.survivors,
        generations=search.generations,
        max_levels=search.max_levels,
        seed=job.config.seed,
    )
    outcome = evolve(
        genetics.limits,
        genetics.seeds(search.start, start),
        evaluate,
        settings,
        seconds=search.seconds,
        state=state,
        fingerprint=_fingerprint(job, allocator),
        advance=advance,
    )
    # Levels are coarser than the plan they start from: it may still be the best.
    started = fitness(start)
    history = {
        "fitness": search.fitness,
        "best": min(started, outcome.fitness),
        "history": list(outcome.history),
        "generations": outcome.generations,
        "evaluations": outcome.evaluations,
        "seconds": outcome.seconds,
        "complete": outcome.complete,
        "start": started,
    }
    return start if started <= outcome.fitness else genetics.decode(outcome.best), history


def _fingerprint(job: Job, allocator: Allocator) -> str:
    """Name all that a fitness depends on: request, curves, and how many threads sum."""
    config = job.config.to_dict()
    for free in ("seconds", "generations"):
        config["search"].pop(free)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(config, sort_keys=True).encode())
    digest.update(str((torch.get_num_threads(), torch.__version__)).encode())
    for stage in allocator.curves:
        for layer in allocator.layers:
            digest.update(stage[layer.name].order.numpy().tobytes())
            digest.update(stage[layer.name].losses.tobytes())
    return digest.hexdigest()
