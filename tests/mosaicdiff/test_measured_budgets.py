"""Budgets that a measurement decides: milliseconds of a call, and the error of the result."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.allocation import latency_budget
from mosaicdiff.allocation.decide import make_probe
from mosaicdiff.request import prepare

from .commands import refused, run_json
from .conftest import linear_scheduler, tiny_batches, tiny_denoiser
from .test_latency_table import measure, weights

SMALL = {"samples": 32, "steps": 20, "probe_samples": 4}


def prune(**config):
    return mosaicdiff.prune(
        tiny_denoiser(), PruneConfig(**({"allocation": "optimal"} | SMALL | config)),
        scheduler=linear_scheduler(), calibration=tiny_batches(),
    )  # fmt: skip


def call_ms(staged) -> float:
    """Weights of a call in thousands, mean over the steps: the table's milliseconds."""
    pairs = zip(staged.info.steps, staged.stage_models, strict=True)
    return sum(n * weights(model) for n, model in pairs) / sum(staged.info.steps) / 1000


class Machine:
    """Stands for the measurements: networks that are pruned take `slower` times the table's."""

    def __init__(self, monkeypatch, slower=1.0, never=False):
        self.slower, self.never, self.measured, self.tables = slower, never, 0, 0
        monkeypatch.setattr(latency_budget, "latency_table", self.table)
        monkeypatch.setattr(latency_budget, "measure_latency", self.latency)

    def table(self, denoiser, adapter, *, batch_size, shared_norms, advance):
        assert shared_norms == "exact"
        self.tables += 1
        return measure(denoiser, batch_size=batch_size, advance=advance)

    def latency(self, dense, staged, *, batch_size, repeats):
        self.measured += 1
        whole = weights(dense) / 1000
        spent = 2 * whole if self.never else self.slower * call_ms(staged)
        return SimpleNamespace(dense=SimpleNamespace(milliseconds=whole), speedup=whole / spent)


@pytest.mark.parametrize("allocation", ["optimal", "score"])
@pytest.mark.parametrize("slower", [1.0, 1.1, 0.9])
@pytest.mark.parametrize("budget", ["0.8x", "absolute"])
def test_a_table_that_is_off_is_corrected(monkeypatch, slower, budget, allocation):
    machine = Machine(monkeypatch, slower)
    dense = weights(tiny_denoiser()) / 1000
    given = f"{0.8 * dense!r}ms" if budget == "absolute" else budget
    result = prune(latency=given, allocation=allocation)
    spent = slower * call_ms(result.denoiser)
    assert spent == pytest.approx(0.8 * dense, rel=0.02)
    decision = result.report.decision
    assert decision.reached == pytest.approx(spent)
    rows = decision.measured["latency"]
    assert len(rows) == machine.measured and machine.tables == 1
    assert (len(rows) == 1) == (slower == 1.0)
    assert rows[0]["pruned_ms"] == pytest.approx(slower * rows[0]["aim"], rel=0.02)


def test_a_machine_that_never_agrees_is_refused_with_the_closest(monkeypatch):
    machine = Machine(monkeypatch, never=True)
    closest = 2 * weights(tiny_denoiser()) / 1000
    with pytest.raises(ValueError, match="must be met within 2%") as refusal:
        prune(latency="0.8x")
    assert f"{machine.measured} measurements was {closest:.3g} ms, 150.0% off" in str(refusal.value)
    assert machine.measured > 1


def test_a_latency_out_of_reach_is_refused_before_calibration(monkeypatch):
    machine = Machine(monkeypatch)
    for budget in ("0.01x", "3x", "1us"):
        with pytest.raises(ValueError, match="latency must be between .* ms"):
            prune(latency=budget)
    assert machine.measured == 0


def test_a_table_from_a_file_takes_the_place_of_measuring(monkeypatch, tmp_path):
    machine = Machine(monkeypatch)
    measure(tiny_denoiser()).save(tmp_path / "table.json")
    result = prune(latency="0.8x", latency_table=str(tmp_path / "table.json"))
    dense = weights(tiny_denoiser()) / 1000
    assert call_ms(result.denoiser) == pytest.approx(0.8 * dense, rel=0.02)
    assert machine.tables == 0


@pytest.mark.parametrize(
    "change, config, message",
    [
        ({"device": "abacus"}, {}, "device must be .* got 'abacus'"),
        ({"dtype": "bfloat16"}, {}, "dtype must be 'float32', .* got 'bfloat16'"),
        ({}, {"latency_batch": 4}, "batch_size must be 4, .* got 1"),
        ({"network": "another"}, {}, "network must be .* got 'another'"),
    ],
    ids=["device", "dtype", "batch", "network"],
)
def test_a_table_of_other_conditions_is_refused(monkeypatch, tmp_path, change, config, message):
    machine = Machine(monkeypatch)
    replace(measure(tiny_denoiser()), **change).save(tmp_path / "table.json")
    with pytest.raises(ValueError, match=f"LatencyTable: {message}"):
        prune(latency="0.8x", latency_table=str(tmp_path / "table.json"), **config)
    assert machine.measured == 0


def test_the_command_refuses_a_table_that_is_none(tiny, tmp_path):
    (tmp_path / "text.json").write_text("no table")
    for name, message in (("nowhere.json", "path must hold a table"), ("text.json", "path must")):
        refused(message, "prune", *tiny.options, "--latency", "0.8x", "--latency-table",
                tmp_path / name, "--output", tmp_path / "out")  # fmt: skip


def test_the_command_meets_milliseconds(tiny, tiny_file, tmp_path, monkeypatch):
    Machine(monkeypatch, slower=1.1)
    report = run_json("prune", *tiny.options, "--from", tiny_file, "--latency", "0.8x",
                      "--allocation", "optimal", "--output", tmp_path / "out")  # fmt: skip
    decision = report["decision"]
    assert decision["budget"] == "latency 0.8x"
    wanted = 0.8 * weights(tiny_denoiser()) / 1000
    assert decision["reached"] == pytest.approx(wanted, rel=0.02)


def prune_for_quality(bound, allocation="optimal", clip=False):
    return mosaicdiff.prune(
        tiny_denoiser(), PruneConfig(**SMALL, allocation=allocation, quality=bound),
        scheduler=linear_scheduler(clip_sample=clip), calibration=tiny_batches(),
    )  # fmt: skip


@pytest.mark.parametrize("bound", [1e-4, 1e-3])
def test_the_error_of_a_quality_budget_is_just_under_it(bound):
    result = prune_for_quality(bound)
    reached = result.report.decision.reached
    assert 0.9 * bound < reached <= bound
    config = PruneConfig(**SMALL, quality=bound)
    job = prepare(tiny_denoiser(), config, linear_scheduler(clip_sample=False), tiny_batches())
    probe, staged = make_probe(job, "a test"), result.denoiser
    with torch.no_grad():
        error = probe.error(probe.run(staged.stage_models, staged.info.steps))
    assert error == pytest.approx(reached, rel=1e-3)


@pytest.mark.parametrize(
    "bound, allocation, clip",
    [(0.1, "optimal", True), (0.01, "score", True), (1e-3, "score", False)],
)
def test_where_errors_jump_nothing_more_fits_under_the_bound(bound, allocation, clip):
    """A sampler that clips, and whole heads, leave gaps that no plan's error falls in."""
    report = prune_for_quality(bound, allocation, clip).report
    above = [r for r in report.decision.measured["errors"] if r["error"] > bound]
    reached = report.decision.reached
    assert reached <= bound
    assert reached > 0.8 * bound or min(r["sparsity"] for r in above) - report.sparsity < 0.005


def test_a_looser_bound_removes_more():
    tight, loose = (prune(quality=bound).report for bound in (0.01, 0.1))
    assert 0 < tight.sparsity < loose.sparsity


def test_a_bound_above_everything_removes_everything():
    assert prune(quality=1e6).report.sparsity == pytest.approx(0.95, abs=0.02)


def test_a_bound_that_nothing_meets_is_refused_with_the_least():
    with pytest.raises(ValueError, match="must be more than what the least removal") as refusal:
        prune(quality=1e-14, granularity="layers")
    text = str(refusal.value)  # what nothing removed costs would tell nothing
    assert float(text.split("sparsity of ")[1].split("%")[0]) > 0
    assert float(text.split("error is ")[1].split(". Ask")[0]) > 1e-14


def test_no_plan_is_measured_twice():
    rows = prune(quality=0.001, allocation="score").report.decision.measured["errors"]
    sparsities = [row["sparsity"] for row in rows]
    assert len(set(sparsities)) == len(sparsities) > 2
