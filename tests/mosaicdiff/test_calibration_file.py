"""A calibration kept in a file prunes bit for bit as one just made, and only what it is of."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.checkpoint import storage_of
from mosaicdiff.pipeline import calibrate
from mosaicdiff.statistics import calibration_file
from mosaicdiff.statistics.calibration_file import (
    load_calibration_file,
    save_calibration,
    stated_bytes,
)

from .conftest import linear_scheduler, tiny_batches, tiny_denoiser

SMALL = {"samples": 32, "steps": 20}


def calibrated(**config):
    return calibrate(
        tiny_denoiser(), PruneConfig(**(SMALL | config)), scheduler=linear_scheduler(),
        calibration=tiny_batches(),
    )  # fmt: skip


def prune(measured=None, model=None, scheduler=None, **config):
    return mosaicdiff.prune(
        tiny_denoiser() if model is None else model,
        PruneConfig(**(SMALL | config)),
        scheduler=scheduler or linear_scheduler(),
        calibration=tiny_batches() if measured is None else None,
        measured=measured,
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "tiny.cal"
    written = save_calibration(calibrated(), path)
    assert written == path.stat().st_size
    return path


@pytest.mark.parametrize(
    "config",
    [
        {"allocation": "score", "sparsity": 0.2},
        {"allocation": "score", "sparsity": 0.5},
        {"allocation": "score", "macs": "0.7x"},
        {"allocation": "uniform", "sparsity": 0.3},
        {"allocation": "optimal", "sparsity": 0.2},
        {"allocation": "optimal", "sparsity": 0.5, "round_to": 16},
        {"allocation": "optimal", "macs": "0.7x"},
        {"allocation": "optimal", "params": "0.9x"},
        {"allocation": "optimal", "size": "0.9x"},
        {"allocation": "score", "criterion": "magnitude", "compensation": "none"},
        {"allocation": "optimal", "criterion": "wanda", "compensation": "affine"},
        {"allocation": "optimal", "criterion": "random"},
        {"allocation": "optimal", "damping": 0.1},
        {"allocation": "optimal", "choice": "nested"},
        {"allocation": "optimal", "choice": "shared"},
        {"allocation": "explicit", "stage_sparsity": (0.5, 0.0, 0.25)},
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()),
)
def test_the_file_prunes_bit_for_bit_as_the_model_does(file, config):
    direct, loaded = prune(**config), prune(file, **config)
    first, second = (storage_of(result.denoiser)[0] for result in (direct, loaded))
    assert any(name.startswith("kept.") for name in first) and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert replace(direct.report, seconds=0) == replace(loaded.report, seconds=0)


@pytest.mark.parametrize("budget", ["sparsity", "macs", "params", "size"])
def test_the_file_needs_no_run_of_the_model(file, budget):
    model, calls = tiny_denoiser(), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *a: calls.append(1))
    value = 0.3 if budget == "sparsity" else "0.9x"
    prune(file, model, allocation="optimal", **{budget: value})
    assert not calls
    model(torch.randn(1, 2, 8, 8), torch.tensor([5]), torch.tensor([1]))
    assert calls


def test_a_plan_from_the_file_is_what_prune_does(file):
    config = PruneConfig(**SMALL, allocation="optimal", params="0.9x")
    made = mosaicdiff.plan(tiny_denoiser(), config, scheduler=linear_scheduler(), measured=file)
    report = prune(file, allocation="optimal", params="0.9x").report
    kept = [[layer.kept for layer in stage.layers] for stage in report.stages]
    gone = [
        [layer.groups - n for layer, n in zip(made.layers, row, strict=True)]
        for row in made.removed
    ]
    assert gone == kept


@pytest.mark.parametrize(
    "config",
    [{"quality": 0.01}, {"latency": "0.9x"}, {"allocation": "evolutionary", "stages": 3}],
    ids=lambda c: next(iter(c)),
)
def test_a_plan_that_only_measuring_tells_is_refused(file, config):
    config = PruneConfig(**(SMALL | {"allocation": "optimal"} | config))
    with pytest.raises(ValueError, match="plan: .*measur"):
        mosaicdiff.plan(
            tiny_denoiser(), config, scheduler=linear_scheduler(), measured=file,
            calibration=tiny_batches(),
        )  # fmt: skip


def test_the_size_stated_is_the_size_written(file):
    measured = load_calibration_file(file)
    stated = stated_bytes(measured.layers, len(measured.division))
    assert file.stat().st_size == pytest.approx(stated, rel=0.05)


def changed():
    model = tiny_denoiser()
    model.transformer_blocks[1].ff.net[2].weight.data[0, 0] += 1e-3
    return model


@pytest.mark.parametrize(
    "other, message",
    [
        ({"model": changed}, "the weights must be those it was made for"),
        ({"model": lambda: tiny_denoiser().bfloat16()}, "the type of the weights must be"),
        ({"model": lambda: tiny_denoiser(layers=2)}, "the weights must be those"),
        (
            {"scheduler": lambda: DDIMScheduler(beta_schedule="scaled_linear")},
            "the noise schedule must be those it was made for",
        ),
    ],
    ids=["weights", "dtype", "depth", "schedule"],
)
def test_the_file_of_another_model_is_refused(file, other, message):
    with pytest.raises(ValueError, match=message):
        prune(file, **{name: make() for name, make in other.items()})


def described(file, path, **changes):
    """Copy a file with other values in its description; None leaves one out."""
    with safe_open(file, framework="pt") as opened:
        values = json.loads(opened.metadata()["mosaicdiff_calibration"]) | changes
    values = {name: value for name, value in values.items() if value is not None}
    save_file(load_file(file), path, metadata={"mosaicdiff_calibration": json.dumps(values)})


def lacking(file, path):
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if name.startswith("hessian.1.")))
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda file, path: None, "but there is none"),
        (lambda file, path: path.mkdir(), "it is a folder"),
        (lambda file, path: save_file({"latents": torch.zeros(2)}, path), "it holds none"),
        (lambda file, path: path.write_bytes(file.read_bytes()[:-100]), "could not be read"),
        (lambda file, path: path.write_bytes(file.read_bytes()[:50]), "could not be read"),
        (lambda file, path: path.write_text("no tensors"), "could not be read"),
        (lambda file, path: path.write_bytes(b""), "could not be read"),
        (lambda f, path: described(f, path, format_version=9), "format_version must be 4, got 9"),
        (lambda f, path: described(f, path, format_version=None), "format_version must be 4"),
        (lambda f, path: described(f, path, steps=None), "could not be read"),
        (lacking, "must hold the statistics of transformer_blocks"),
    ],
    ids=["missing", "folder", "other", "truncated", "header", "text", "empty", "version",
         "no version", "damaged", "tensor"],
)  # fmt: skip
def test_another_file_is_refused(file, tmp_path, spoil, message):
    spoil(file, tmp_path / "other.cal")
    with pytest.raises(ValueError, match=message):
        prune(tmp_path / "other.cal")


def test_one_changed_bit_is_refused_by_name(file, tmp_path):
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    raw[8 + length + 4096] ^= 1
    (tmp_path / "flipped").write_bytes(raw)
    with pytest.raises(ValueError, match=r"flipped must be as it was written.*Calibrate again"):
        prune(tmp_path / "flipped")


def test_stages_must_be_made_of_whole_bins(file):
    edges = [stage.first for stage in load_calibration_file(file).division.stages]
    had = ",".join(str(edge) for edge in sorted(edges)[1:])
    with pytest.raises(ValueError, match=rf"parted at timesteps where it was \({had}\), but 500"):
        prune(file, boundaries=(edges[1], 500))
    report = prune(file, boundaries=(edges[1],)).report
    assert [stage.first_timestep for stage in report.stages] == [edges[1], 0]


def test_weights_that_were_not_measured_are_refused(file, tmp_path):
    save_calibration(calibrated(weighting="raw"), tmp_path / "raw.cal")
    for weighting in ("sensitivity", "trajectory"):
        with pytest.raises(ValueError, match=f"weighting {weighting} was not measured"):
            prune(tmp_path / "raw.cal", allocation="optimal", weighting=weighting)
    with pytest.raises(ValueError, match="depth_rank needs a measurement"):
        prune(file, allocation="optimal", granularity="blocks", depth_rank="cosine", stages=1)


def test_weights_of_one_kind_do_not_pass_for_another(tmp_path):
    path = tmp_path / "sensitivity.cal"
    save_calibration(calibrated(weighting="sensitivity"), path)
    config = {"allocation": "optimal", "sparsity": 0.3}
    direct, loaded = (prune(m, weighting="sensitivity", **config) for m in (None, path))
    assert replace(direct.report, seconds=0) == replace(loaded.report, seconds=0)
    direct, loaded = (prune(m, weighting="raw", **config) for m in (None, path))
    assert replace(direct.report, seconds=0) == replace(loaded.report, seconds=0)
    with pytest.raises(ValueError, match="weighting trajectory was not measured"):
        prune(path, weighting="trajectory", **config)


def test_raw_stages_from_the_data_leave_weights_aside():
    config = {"stages": "auto", "bins": 4, "allocation": "optimal", "max_stages": 2}
    weighed = calibrated(weighting="sensitivity", **config)
    rows = weighed.weights["sensitivity"]
    heavy = {"sensitivity": [dict.fromkeys(row, 1e6 ** (k == 0)) for k, row in enumerate(rows)]}
    first, second = (
        prune(replace(weighed, weights=weights), weighting="raw", **config).report
        for weights in (heavy, {})
    )
    assert replace(first, seconds=0) == replace(second, seconds=0)


def test_bins_without_a_step_of_the_plan_are_refused():
    measured = calibrated(stages="auto", bins=8, allocation="optimal")
    with pytest.raises(ValueError, match="steps must visit each of the"):
        prune(measured, steps=3, stages="auto", allocation="optimal")


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(file, tmp_path, monkeypatch, failure):
    measured, path = load_calibration_file(file), tmp_path / "new" / "tiny.cal"

    def fail(tensors, where, metadata):
        where.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(calibration_file, "save_file", fail)
    with pytest.raises(type(failure)):
        save_calibration(measured, path)
    assert list(path.parent.iterdir()) == []
    path.write_text("old")
    with pytest.raises(type(failure)):
        save_calibration(measured, path)
    assert path.read_text() == "old" and len(list(path.parent.iterdir())) == 1


def test_a_loaded_file_can_be_written_again(file, tmp_path):
    save_calibration(load_calibration_file(file), tmp_path / "again.cal")
    assert (tmp_path / "again.cal").stat().st_mode == file.stat().st_mode
    first, second = load_file(file), load_file(tmp_path / "again.cal")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
