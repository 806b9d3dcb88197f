"""Genomes that all save the same, and what plans lose on the trajectory."""

import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.allocation.decide import make_allocator, make_probe, measured_error
from mosaicdiff.pipeline import calibrate
from mosaicdiff.request import prepare
from mosaicdiff.search.fitness import TrajectoryFitness
from mosaicdiff.search.genes import Genetics
from mosaicdiff.search_config import SearchConfig

from .conftest import linear_scheduler, tiny_batches, tiny_denoiser

BASE = {"samples": 32, "steps": 8, "stages": 4, "allocation": "evolutionary", "probe_samples": 4}
KINDS = [("stages", "optimal"), ("stages", "uniform"), ("layers", "optimal")]


@pytest.fixture(scope="module")
def calibration():
    return calibrate(
        tiny_denoiser(), PruneConfig(**BASE), scheduler=linear_scheduler(),
        calibration=tiny_batches(),
    )  # fmt: skip


def setup(calibration, **config):
    config = PruneConfig(**(BASE | {"sparsity": 0.4} | config))
    job = prepare(tiny_denoiser(), config, linear_scheduler(), tiny_batches(), calibration)
    allocator, fitter = make_allocator(job, job.measured, lambda *row: None)
    return job, allocator, fitter


def setup_genes(calibration, genes, within, **config):
    search = SearchConfig(genes=genes, within=within, levels=20)
    job, allocator, _ = setup(calibration, search=search, **config)
    start = allocator.meet(job.config.budget, "optimal")
    return allocator, Genetics(allocator, start, job.config.budget.unit), start


def random_genomes(genetics, start, count=60):
    rng, total = np.random.default_rng(0), sum(genetics.encode(start))
    limits = np.array(genetics.limits)
    for _ in range(count):
        pool = np.repeat(np.arange(len(limits)), limits)
        drawn = rng.choice(pool, size=total, replace=False)
        yield tuple(np.bincount(drawn, minlength=len(limits)).tolist())


def largest_group(allocator):
    """The share that one group, at most, gives of the whole."""
    whole = allocator.costs.prunable * sum(allocator.frame.steps)
    return max(
        n * layer.cost for n in allocator.frame.steps for layer in allocator.layers
    ) / whole  # fmt: skip


@pytest.mark.parametrize("target", [0.1, 0.4, 0.85])
@pytest.mark.parametrize("genes, within", KINDS)
def test_every_genome_saves_the_target_within_a_group(calibration, genes, within, target):
    allocator, genetics, start = setup_genes(calibration, genes, within, sparsity=target)
    for genome in random_genomes(genetics, start):
        plan = genetics.decode(genome)
        assert plan.sparsity >= start.sparsity - 1e-9
        assert plan.sparsity <= start.sparsity + largest_group(allocator)


@pytest.mark.parametrize("genes, within", KINDS)
def test_equal_genes_that_all_round_alike_save_the_target_too(calibration, genes, within):
    allocator, genetics, start = setup_genes(calibration, genes, within, sparsity=0.35)
    total = sum(genetics.encode(start))
    even, rest = divmod(total, len(genetics.limits))
    genome = tuple(even + (i < rest) for i in range(len(genetics.limits)))
    plan = genetics.decode(genome)
    assert 0 <= plan.sparsity - start.sparsity + 1e-9 <= largest_group(allocator)


@pytest.mark.parametrize("genes, within", KINDS)
@pytest.mark.parametrize("unit, asked", [("sparsity", 0.4), ("macs", "0.7x")])
def test_the_start_comes_back_nearly(calibration, genes, within, unit, asked):
    budget = {"sparsity": None, unit: asked}
    allocator, genetics, start = setup_genes(calibration, genes, within, **budget)
    genome = genetics.encode(start)
    assert all(0 <= n <= most for n, most in zip(genome, genetics.limits, strict=True))
    again = genetics.decode(genome)
    scale = allocator.costs.dense(unit) or 1.0
    wanted, slack = allocator.cost(unit, start) / scale, 1.2 * largest_group(allocator)
    assert allocator.cost(unit, again) / scale == pytest.approx(wanted, abs=slack)
    if within == "optimal":
        assert allocator.error(again) <= 1.1 * allocator.error(start)
        for k in range(4):
            assert again.stage_sparsity(k) == pytest.approx(start.stage_sparsity(k), abs=0.1)
    for seed in genetics.seeds(("optimal", "score"), start):
        assert sum(seed) == sum(genome)


@pytest.mark.parametrize("within", ["optimal", "uniform"])
def test_a_search_over_stages_keeps_them_under_the_cap(calibration, within):
    allocator, genetics, start = setup_genes(
        calibration, "stages", within, sparsity=0.4, max_sparsity=0.5
    )
    slack = 4 * largest_group(allocator) if within == "uniform" else 0
    for genome in random_genomes(genetics, start, 20):
        plan = genetics.decode(genome)
        assert max(plan.stage_sparsity(k) for k in range(4)) <= 0.5 + slack + 1e-6


def test_uniform_stages_give_every_layer_the_same_share(calibration):
    _, genetics, start = setup_genes(calibration, "stages", "uniform", round_to=1)
    plan = genetics.decode(genetics.encode(start))
    for k, row in enumerate(plan.removed):
        shares = [n / layer.groups for n, layer in zip(row, plan.layers, strict=True)]
        neurons = shares[1::2]
        # One layer of one stage evens out the sum.
        assert sorted(neurons)[1] == pytest.approx(plan.stage_sparsity(k), abs=0.13)


def test_tied_stages_need_genes_of_layers(calibration):
    with pytest.raises(ValueError, match="genes must be layers with choice 'shared'"):
        setup_genes(calibration, "stages", "optimal", choice="shared")
    _, genetics, start = setup_genes(calibration, "layers", "optimal", choice="shared")
    for genome in random_genomes(genetics, start, 10):
        assert len(set(genetics.decode(genome).removed)) == 1


def test_nothing_to_remove_is_found_at_once(calibration):
    config = PruneConfig(**BASE, sparsity=0.0, search=SearchConfig(generations=1))
    result = mosaicdiff.prune(
        tiny_denoiser(), config, scheduler=linear_scheduler(), calibration=tiny_batches(),
        measured=calibration,
    )  # fmt: skip
    assert result.report.sparsity == 0 and result.report.decision.measured["search"]["best"] == 0


def some_plans(allocator):
    rows = [(1, 30, 0, 60, 2, 20), (0, 0, 0, 0, 0, 0), (2, 64, 2, 64, 2, 64)]
    return [allocator.plan_of(removed) for removed in itertools.product(rows[:2], rows, rows, rows)]


@pytest.mark.parametrize("kind", ["latent", "trajectory"])
def test_shared_beginnings_change_no_bit(calibration, kind):
    job, allocator, fitter = setup(calibration)
    probe = make_probe(job, "a test")
    shared = TrajectoryFitness(probe, fitter, kind)
    for plan in some_plans(allocator)[::7]:
        alone = TrajectoryFitness(make_probe(job, "a test"), fitter, kind)
        assert shared(plan) == alone(plan)
        if kind == "latent":
            assert shared(plan) == measured_error(probe, fitter, plan)


def test_fitness_is_no_error_for_the_dense_model_and_more_for_less(calibration):
    job, allocator, fitter = setup(calibration)
    vae = SimpleNamespace(
        dtype=torch.float32,
        config=SimpleNamespace(scaling_factor=1.0),
        decode=lambda latents: SimpleNamespace(sample=latents / 3),
    )
    none, some, much = (
        allocator.plan_of(((n, 16 * n) * 3,) * 4) for n in (0, 1, 3)
    )  # fmt: skip
    for kind in ("latent", "trajectory", "ssim"):
        fitness = TrajectoryFitness(make_probe(job, "a test"), fitter, kind, vae)
        assert fitness(none) == pytest.approx(0, abs=1e-12)
        assert 0 < fitness(some) < fitness(much)


def test_a_metric_of_pictures_scores_the_pictures_alone(calibration, monkeypatch):
    fake = SimpleNamespace(
        list_models=lambda metric_mode=None: ["mean"],
        create_metric=lambda name: Mean(),
    )
    monkeypatch.setitem(sys.modules, "pyiqa", fake)
    job, allocator, fitter = setup(calibration)
    vae = SimpleNamespace(
        dtype=torch.float32,
        config=SimpleNamespace(scaling_factor=2.0),
        decode=lambda latents: SimpleNamespace(sample=latents),
    )
    fitness = TrajectoryFitness(make_probe(job, "a test"), fitter, "iqa:mean", vae)
    probe = make_probe(job, "a test")
    expected = (probe.dense().latents / 4 + 0.5).clamp(0, 1).mean()
    assert fitness(allocator.plan_of(((0,) * 6,) * 4)) == pytest.approx(float(expected), rel=1e-6)


class Mean:
    lower_better = True

    def __call__(self, pictures):
        return pictures.mean((1, 2, 3))


@pytest.mark.parametrize("kind", ["ssim", "iqa:brisque"])
def test_a_bare_denoiser_makes_no_pictures(calibration, kind):
    job, _, fitter = setup(calibration)
    with pytest.raises(ValueError, match="must be latent or trajectory with a bare denoiser"):
        TrajectoryFitness(make_probe(job, "a test"), fitter, kind)


def test_a_budget_that_does_not_add_up_is_refused():
    with pytest.raises(ValueError, match="budget must be a sparsity or macs.*got params"):
        replace(PruneConfig(**BASE), params="0.9x")
