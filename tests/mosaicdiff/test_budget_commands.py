"""Budgets in the user's units: met as measured on the disk, or refused with what can be had."""

import json

import pytest

from mosaicdiff.adapters import adapter_for

from .commands import refused, run, run_json, stored, weights_file
from .conftest import tiny_denoiser

DENSE = sum(p.numel() for p in tiny_denoiser().parameters())
MACS = adapter_for(tiny_denoiser()).macs(tiny_denoiser()).total


def measures(report, output):
    """What the checkpoint costs, looked at without the budget's own arithmetic."""
    steps = [stage["steps"] for stage in report["stages"]]
    layers = adapter_for(tiny_denoiser()).layers(tiny_denoiser())
    cost = {layer.name: layer.cost for layer in layers}
    gone = sum(
        count * sum((row["groups"] - row["kept"]) * cost[row["name"]] for row in stage["layers"])
        for count, stage in zip(steps, report["stages"], strict=True)
    )
    spent = zip(steps, report["stages"], strict=True)
    tensors = stored(output)
    return {
        "sparsity": gone / sum(steps) / sum(la.groups * la.cost for la in layers),
        "macs": sum(count * stage["macs_with_attention"] for count, stage in spent),
        "params": sum(t.numel() for name, t in tensors.items() if not name.startswith("kept.")),
        "size": weights_file(output).stat().st_size,
    }


@pytest.mark.parametrize("allocation", ["optimal", "score"])
@pytest.mark.parametrize(
    "unit, text, wanted",
    [
        ("sparsity", "40%", 0.4),
        ("macs", "0.7x", 0.7 * MACS * 20),
        ("macs", "10M", 10e6),
        ("params", "0.9x", 0.9 * DENSE),
        ("params", "160k", 160e3),
        ("size", "0.9x", 0.9 * 4 * DENSE),
        ("size", "680kB", 680e3),
    ],
)
def test_a_budget_is_met_as_measured_afterwards(
    tiny, tiny_file, tmp_path, allocation, unit, text, wanted
):
    output = tmp_path / "out"
    report = run_json(
        "prune", *tiny.options, "--from", tiny_file, "--output", output,
        f"--{unit}", text, "--allocation", allocation,
    )  # fmt: skip
    measured = measures(report, output)
    assert measured[unit] == pytest.approx(wanted, rel=0.02)
    # The header is all that is not known exactly; bytes without it would be off by more than it.
    header = int.from_bytes(weights_file(output).read_bytes()[:8], "little")
    off = abs(report["decision"]["reached"] - measured[unit])
    assert off < (header if unit == "size" else 1e-9 * measured[unit])
    assert report["parameters"] == measured["params"]
    assert report["sparsity"] == pytest.approx(measured["sparsity"])


def test_a_larger_checkpoint_is_as_large_as_was_asked(tmp_path):
    """On the embedded model a header is nothing: bytes are met closely."""
    report = run_json(
        "prune", "digits", "--samples", 8, "--steps", 6, "--stages", 2, "--size", "14MB",
        "--allocation", "optimal", "--output", tmp_path / "out",
    )  # fmt: skip
    assert weights_file(tmp_path / "out").stat().st_size == pytest.approx(14e6, rel=0.01)
    assert report["decision"]["reached"] == pytest.approx(14e6, rel=0.01)


def test_a_quality_budget_is_met(tiny, tiny_file, tmp_path):
    report = run_json(
        "prune", *tiny.options, "--from", tiny_file, "--output", tmp_path / "out",
        "--quality", "0.001", "--allocation", "optimal", "--probe-samples", 4,
    )  # fmt: skip
    assert 0.0009 < report["decision"]["reached"] <= 0.001
    last = [row for row in report["decision"]["measured"]["errors"] if row["error"] <= 0.001]
    assert report["sparsity"] == max(row["sparsity"] for row in last)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--sparsity", "30%", "--macs", "0.7x"), "in one unit, got sparsity and macs"),
        (("--params", "0.9x", "--size", "0.9x"), "in one unit, got params and size"),
        (("--macs", "3Q"), "macs must be such as 0.6x"),
        (("--size", "3T"), "size must be such as 0.8x, or 1.2GB"),
        (("--size", "680000"), "size must be such as"),
        (("--params", "many"), "params must be such as 0.8x"),
        (("--latency", "25"), "latency must be such as 0.7x, or 25ms"),
        (("--quality", "0.5x"), "quality must be such as 0.01"),
        (("--sparsity", "40"), "sparsity must be in [0, 1)"),
        (("--macs", "-1M"), "macs must be more than 0"),
        (("--quality", "0"), "quality must be more than 0"),
        (("--macs", "0.01x"), "macs must be between"),
        (("--params", "1k"), "params must be between"),
        (("--size", "1kB"), "size must be between"),
        (("--macs", "2x"), "macs must be between"),
        (("--params", "1M"), "params must be between"),
        (("--size", "1.5x"), "size must be between"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("allocation", ["optimal", "score"])
def test_a_budget_out_of_reach_says_what_can_be_had(tiny, tmp_path, allocation, options, message):
    refused(
        message, "prune", *tiny.options, "--output", tmp_path / "out", *options,
        "--allocation", allocation,
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_refused_range_can_be_had(tiny, tiny_file, tmp_path):
    """The dense end, and an end that only the calibration tells, both named by the message."""
    options = ("prune", *tiny.options, "--from", tiny_file, "--allocation", "optimal")
    result = run(*options, "--macs", "0.001x", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "and 14.09M (dense)" in result.stderr, result.stderr
    report = run_json(*options, "--macs", "1x", "--output", tmp_path / "whole")
    assert report["macs_with_attention"] == report["macs_dense_with_attention"]
    result = run(*options, "--params", "0.8x", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "These settings reach" in result.stderr
    least = result.stderr.split("settings reach ")[1].split(" to ")[0]
    report = run_json(*options, "--params", least, "--output", tmp_path / "least")
    assert report["parameters"] == pytest.approx(float(least.removesuffix("k")) * 1e3, rel=0.02)


def test_the_command_line_wins_over_the_file(tiny, tiny_file, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"macs": "0.9x", "allocation": "optimal", "seed": 0,
                                "samples": 32, "steps": 20}))  # fmt: skip
    options = ("prune", *tiny.options, "--from", tiny_file, "--config", file)
    report = run_json(*options, "--output", tmp_path / "file")
    assert report["decision"]["budget"] == "macs 0.9x" and report["config"]["macs"] == "0.9x"
    report = run_json(*options, "--sparsity", "20%", "--output", tmp_path / "line")
    assert report["decision"]["budget"] == "sparsity 20%" and report["config"]["macs"] is None
    assert report["decision"]["allocation"] == "optimal"
    assert report["sparsity"] == pytest.approx(0.2, rel=0.02)


def test_one_number_of_stages_is_told_from_a_timestep_by_the_steps_of_the_file(tiny, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"steps": 100, "samples": 8}))
    options = (tiny.folder, "--calibration", tiny.latents, "--config", file, "--allocation",
               "score", "--dry-run", "--output", tmp_path / "out")  # fmt: skip
    assert len(run_json("prune", *options, "--stages", 60)["stages"]) == 60
    assert len(run_json("prune", *options, "--stages", 160)["stages"]) == 2
