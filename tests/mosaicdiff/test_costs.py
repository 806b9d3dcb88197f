"""What plans are said to cost, against what comes out."""

import pytest
import torch

from mosaicdiff import PruneConfig
from mosaicdiff.allocation.costs import describe_cost
from mosaicdiff.allocation.decide import make_allocator
from mosaicdiff.allocation.planning import PrunePlan
from mosaicdiff.checkpoint import storage_of, weights_name
from mosaicdiff.pipeline import calibrate, prune
from mosaicdiff.request import prepare
from mosaicdiff.solving.fit import assemble

from .conftest import linear_scheduler, tiny_batches, tiny_denoiser

STEPS = 20
EARLY_ONLY = ((1, 40, 0, 128, 4, 0), (0, 0, 0, 0, 0, 0), (2, 40, 0, 0, 0, 128))
UNEVEN = ((1, 40, 3, 0, 4, 128), (2, 7, 0, 5, 1, 100), (0, 90, 2, 128, 4, 1))
CUT_EVERYWHERE = ((1, 40, 3, 9, 2, 127), (2, 7, 1, 5, 1, 100), (3, 90, 2, 30, 3, 1))
ALL_GONE = ((4, 128, 4, 128, 4, 128),) * 3
NOTHING = ((0,) * 6,) * 3


@pytest.fixture(scope="module")
def calibrations():
    """One calibration for each number of stages."""
    made = {}
    for stages in (1, 3):
        config = PruneConfig(stages=stages, samples=48, steps=STEPS)
        made[stages] = calibrate(
            tiny_denoiser(), config, scheduler=linear_scheduler(), calibration=tiny_batches()
        )
    return made


def request(calibrations, **config):
    job = prepare(
        tiny_denoiser(), PruneConfig(samples=48, steps=STEPS, **config), linear_scheduler(), None,
        calibrations[config.get("stages", 3)],
    )  # fmt: skip
    allocator, fitter = make_allocator(job, job.measured, lambda *row: None)
    return job, allocator, fitter


def stored(staged, folder):
    staged.save_pretrained(folder)
    return (folder / weights_name()).stat().st_size


def check(job, allocator, plan, staged, folder):
    count = sum(t.numel() for t in unique_tensors(staged).values())
    assert allocator.cost("params", plan) == count
    macs = sum(m.total * n for m, n in zip(staged.macs(), plan.steps, strict=True))
    assert allocator.cost("macs", plan) == pytest.approx(macs, rel=1e-12)
    assert allocator.cost("sparsity", plan) == pytest.approx(plan.sparsity, abs=1e-12)
    assert allocator.cost("size", plan) == pytest.approx(stored(staged, folder), rel=0.02)


def unique_tensors(staged):
    tensors = storage_of(staged)[0]
    return {name: t for name, t in tensors.items() if not name.startswith("kept.")}


@pytest.mark.parametrize("compensation", ["plain", "affine", "none"])
@pytest.mark.parametrize(
    "removed, choice",
    [
        (EARLY_ONLY, "separate"),
        (UNEVEN, "nested"),
        (CUT_EVERYWHERE, "separate"),
        (ALL_GONE, "nested"),
    ],
)
def test_costs_of_any_plan_are_those_of_what_is_made(
    calibrations, removed, choice, compensation, tmp_path
):
    job, allocator, fitter = request(calibrations, choice=choice, compensation=compensation)
    plan = allocator.plan_of(removed)
    staged = assemble(job.adapter, tiny_denoiser(), plan, job.config, fitter.solve(plan))
    check(job, allocator, plan, staged, tmp_path / "out")


@pytest.mark.parametrize(
    "stages, compensation, allocation, choice",
    [
        (1, "plain", "score", "separate"),
        (1, "affine", "optimal", "separate"),
        (3, "affine", "score", "separate"),
        (3, "plain", "score", "nested"),
        (3, "plain", "optimal", "separate"),
        (3, "affine", "optimal", "nested"),
        (3, "plain", "optimal", "shared"),
        (3, "affine", "optimal", "shared"),
    ],
)
def test_the_report_says_what_was_planned(
    calibrations, stages, compensation, allocation, choice, tmp_path
):
    config = {"stages": stages, "compensation": compensation, "choice": choice}
    config |= {"allocation": allocation, "sparsity": 0.45}
    job, allocator, _ = request(calibrations, **config)
    result = prune(
        tiny_denoiser(), job.config, scheduler=linear_scheduler(), measured=calibrations[stages]
    )
    report, plan = result.report, allocator.meet(job.config.budget)
    assert report.sparsity == plan.sparsity == pytest.approx(0.45, abs=0.01)
    assert allocator.cost("params", plan) == report.parameters
    assert allocator.cost("macs", plan) == pytest.approx(report.macs_with_attention * STEPS)
    assert allocator.cost("sparsity", plan) == pytest.approx(report.sparsity, abs=1e-12)
    size = stored(result.denoiser, tmp_path / "out")
    assert allocator.cost("size", plan) == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("unit, asked", [("macs", "0.6x"), ("params", "0.8x"), ("size", "0.85x")])
@pytest.mark.parametrize("allocation", ["score", "optimal"])
def test_a_budget_in_any_unit_is_met(calibrations, allocation, unit, asked):
    job, allocator, _ = request(
        calibrations, allocation=allocation, choice="nested", **{unit: asked}
    )
    plan = allocator.meet(job.config.budget)
    wanted = float(asked[:-1]) * job.costs.dense(unit)
    assert allocator.cost(unit, plan) == pytest.approx(wanted, rel=0.02)


def test_savings_add_up_to_the_cost(calibrations):
    job, allocator, _ = request(calibrations)
    for unit in ("macs", "sparsity"):
        rows = job.costs.savings(unit)
        saved = sum(
            rows[k][i][n] for k, row in enumerate(UNEVEN) for i, n in enumerate(row)
        )  # fmt: skip
        if unit == "macs":
            left = job.costs.dense("macs") - saved
        else:
            left = saved / sum(job.costs.steps) / job.costs.prunable
        assert job.costs.cost(unit, UNEVEN) == pytest.approx(left, rel=1e-12)


@pytest.mark.parametrize("choice", ["separate", "nested"])
@pytest.mark.parametrize("compensation", ["plain", "affine", "none"])
def test_the_predicted_error_is_that_of_the_fitted_layers(calibrations, choice, compensation):
    job, allocator, fitter = request(
        calibrations, choice=choice, weighting="raw", compensation=compensation, damping=1e-7
    )
    plan = allocator.plan_of(CUT_EVERYWHERE)
    solutions, total = fitter.solve(plan), 0.0
    for k, solved in enumerate(solutions):
        for layer in plan.layers:
            reader = job.denoiser.get_submodule(layer.readers[0].module)
            hessian = (
                job.measured.statistics[k][layer.readers[0].name]
                .unpack(torch.device("cpu"))
                .hessian.double()
            )
            weight = reader.weight.double()
            energy = float(((weight @ hessian) * weight).sum())
            total += plan.steps[k] * solved[layer.name].error * energy
    assert allocator.error(plan) == pytest.approx(total, rel=2e-3)


def test_nothing_removed_costs_what_the_dense_model_does(calibrations):
    job, allocator, _ = request(calibrations)
    plan = allocator.plan_of(NOTHING)
    assert isinstance(plan, PrunePlan) and allocator.error(plan) == 0.0
    for unit in ("sparsity", "macs", "params"):
        assert allocator.cost(unit, plan) == job.costs.dense(unit)


@pytest.mark.parametrize(
    "unit, value, text",
    [
        ("sparsity", 0.3, "30.00%"),
        ("latency", 12.34, "12.3 ms"),
        ("size", 1.2e9, "1.2GB"),
        ("size", 12.0, "12 B"),
        ("params", 4.5e8, "450M"),
        ("macs", 3.9e12, "3.9T"),
    ],
)
def test_costs_are_named_in_their_unit(unit, value, text):
    assert describe_cost(unit, value) == text
