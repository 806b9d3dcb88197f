"""A front from one calibration: what separate prunings would give, and the model left alone."""

import json
import math

import pytest
import torch

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.allocation.budget import Budget
from mosaicdiff.sweeping import sweep

from .commands import refused, run, run_json
from .conftest import linear_scheduler, tiny_batches, tiny_denoiser

SMALL = {"samples": 32, "steps": 20, "probe_samples": 4}
GIVEN = {"scheduler": linear_scheduler()}


def budgets(unit, *texts):
    return [Budget.parse(unit, text) for text in texts]


@pytest.mark.parametrize(
    "unit, texts",
    [
        ("sparsity", ("0", "20%", "50%")),
        ("macs", ("0.9x", "9M")),
        ("params", ("0.95x", "160k")),
        ("size", ("0.95x", "650kB")),
    ],
)
def test_every_point_is_what_a_pruning_of_its_own_gives(unit, texts):
    points = sweep(
        tiny_denoiser(), budgets(unit, *texts), PruneConfig(**SMALL),
        allocations=("optimal", "score"), calibration=tiny_batches(), **GIVEN,
    )  # fmt: skip
    assert [point.allocation for point in points] == ["optimal"] * len(texts) + ["score"] * len(
        texts
    )
    for point, text in zip(points, texts * 2, strict=True):
        config = PruneConfig(**SMALL, **{unit: text}, allocation=point.allocation)
        report = mosaicdiff.prune(
            tiny_denoiser(), config, calibration=tiny_batches(), **GIVEN
        ).report
        assert point.sparsity == report.sparsity
        assert point.macs == pytest.approx(20 * report.macs_with_attention)
        assert point.macs_ratio == pytest.approx(
            report.macs_dense_with_attention / report.macs_with_attention
        )
        assert point.params == report.parameters
        assert point.bytes == pytest.approx(report.bytes, rel=0.06)  # a header comes to it
        if point.allocation == "optimal":  # shares by themselves weigh no errors
            assert point.predicted_error == report.decision.predicted_error
        assert point.budget == report.decision.budget
        assert point.stages == {stage.name: stage.sparsity for stage in report.stages}


def test_measured_errors_grow_and_are_those_of_a_quality_budget():
    model, config = tiny_denoiser(), PruneConfig(**SMALL, allocation="optimal")
    points = sweep(
        model, budgets("sparsity", "0", "20%", "60%"), config,
        measure=True, calibration=tiny_batches(), **GIVEN,
    )  # fmt: skip
    errors = [point.measured_error for point in points]
    assert errors[0] == 0 < errors[1] < errors[2] < math.inf


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(pipe, batches, failing):
    dense = pipe.transformer.train()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}

    def stop(what, done, total):
        if failing and what == "plan budgets":
            raise KeyboardInterrupt

    try:
        sweep(
            pipe, budgets("sparsity", "20%", "40%"), PruneConfig(**SMALL), measure=True,
            calibration=batches, progress=stop,
        )  # fmt: skip
    except KeyboardInterrupt:
        assert failing
    assert pipe.transformer is dense and dense.training
    assert dense.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())


@pytest.mark.parametrize(
    "wanted, allocations, message",
    [
        ([], ("optimal",), "budgets must name at least one"),
        (budgets("latency", "25ms"), ("optimal",), "must be of sparsity, macs, params or size"),
        (budgets("quality", "0.01"), ("optimal",), "must be of sparsity, macs, params or size"),
        (budgets("sparsity", "20%"), ("best",), "allocations must be of score, uniform, optimal"),
        (budgets("sparsity", "20%"), ("evolutionary",), "allocations must be of score"),
        (budgets("macs", "0.9x", "0.01x"), ("optimal",), "macs must be between"),
    ],
)
def test_bad_sweeps_are_refused_before_work(wanted, allocations, message):
    heard = []
    with pytest.raises(ValueError, match=message):
        sweep(
            tiny_denoiser(), wanted, PruneConfig(**SMALL), allocations=allocations,
            calibration=tiny_batches(), progress=lambda *row: heard.append(row), **GIVEN,
        )  # fmt: skip
    assert not heard


def test_the_command_says_the_same_as_prune_and_draws_it(tiny, tiny_file, tmp_path):
    options = (*tiny.options, "--from", tiny_file)
    values = run_json(
        "sweep", *options, "--budgets", "20%,40%", "--allocation", "optimal",
        "--against", "score,uniform", "--plot", tmp_path / "front.png",
    )  # fmt: skip
    points = values["points"]
    assert [(p["allocation"], p["budget"]) for p in points] == [
        (name, f"sparsity {share}%")
        for name in ("optimal", "score", "uniform")
        for share in (20, 40)
    ]
    assert all(p["measured_error"] is None for p in points)
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "front.png").stat().st_size > 10_000 and values["plot"].endswith(".png")
    for point in points[1::2]:
        report = run_json(
            "prune", *options, "--output", tmp_path / point["allocation"], "--sparsity", "40%",
            "--allocation", point["allocation"],
        )  # fmt: skip
        assert point["sparsity"] == report["sparsity"]
        assert point["params"] == report["parameters"]
        if point["allocation"] == "optimal":  # shares by themselves weigh no errors
            assert point["predicted_error"] == report["decision"]["predicted_error"]


def test_the_command_measures_and_prints(tiny, tiny_file):
    options = ("sweep", *tiny.options, "--from", tiny_file, "--unit", "macs", "--probe-samples", 4)
    values = run_json(*options, "--budgets", "0.9x,0.6x", "--measure")
    errors = [point["measured_error"] for point in values["points"]]
    assert 0 < errors[0] < errors[1] < math.inf
    printed = run(*options, "--budgets", "0.9x").output
    assert "macs 0.9x" in printed and "predicted from the layers" in printed
    measured = run(*options, "--budgets", "0.9x", "--measure").output
    assert "measured on final latents" in measured


@pytest.mark.parametrize(
    "options, message",
    [
        (("--budgets", ""), "sparsity must be such as 0.3 or 30%"),
        (("--budgets", "20%,,40%"), "sparsity must be such as"),
        (("--budgets", "20%,200%"), "sparsity must be in [0, 1)"),
        (("--budgets", "20%,0.8x"), "sparsity must be such as"),
        (("--budgets", "0.8x,25ms", "--unit", "macs"), "macs must be such as 0.6x"),
        (("--budgets", "20%", "--unit", "latency"), "'latency' is not one of"),
        (("--budgets", "20%", "--against", "best"), "allocations must be of score"),
        (("--budgets", "20%", "--allocation", "best"), "--allocation must be score"),
        (("--budgets", "20%", "--allocation", "evolutionary"), "must be of score"),
        (("--budgets", "20%", "--allocation", "0.5,0.1,0.2"), "must be of score"),
        (("--budgets", "20%", "--plot", "front.txt"), "--plot must end in"),
        (("--budgets", "20%", "--plot", "nowhere/front.png"), "a folder that exists"),
    ],
)
def test_bad_commands_are_refused(tiny, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(message, "sweep", *tiny.options, *options)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_two_budgets_is_refused(tiny, tmp_path):
    (tmp_path / "two.json").write_text(json.dumps({"macs": "0.9x", "params": "0.9x"}))
    options = ("--budgets", "20%", "--config", tmp_path / "two.json")
    refused("must be in one unit, got macs and params", "sweep", *tiny.options, *options)
