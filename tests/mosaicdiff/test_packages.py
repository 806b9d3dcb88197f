"""Packages calibrated with those before them pruned: by hand, killed, resumed, refused."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import mosaicdiff
from mosaic_kernels import prune_columns, prune_weights
from mosaicdiff import PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.packages import engine
from mosaicdiff.request import prepare
from mosaicdiff.statistics.collect import collect

from .commands import refused, run, run_json, stored
from .conftest import linear_scheduler, tiny_batches, tiny_denoiser, tiny_pipeline

SMALL = {"samples": 32, "steps": 20, "stages": 1, "allocation": "uniform"}
SHAPES = {
    "structured": {"sparsity": 0.4},
    "unstructured": {"sparsity": 0.5},
    "2:4": {},
}


def pruned(config, denoiser=None, **arguments):
    denoiser = tiny_denoiser() if denoiser is None else denoiser
    return mosaicdiff.prune(
        denoiser, config, scheduler=linear_scheduler(), calibration=tiny_batches(), **arguments
    )


def tensors(result):
    return {
        f"{k}.{name}": tensor
        for k, stage in enumerate(result.denoiser.stage_models)
        for name, tensor in stage.state_dict().items()
    }


def same(first, second):
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def recorded(network, names, config, modules):
    """H and the number of tokens of each linear's input, from recorded activations, float64."""
    job = prepare(modules, config, linear_scheduler(), tiny_batches())
    seen = {name: [] for name in names}
    handles = [
        modules.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].double().flatten(0, -2))
        )
        for name in names
    ]
    collect(job, network, {}, lambda *row: None)
    for handle in handles:
        handle.remove()
    return {name: (x := torch.cat(rows)).T @ x / len(x) for name, rows in seen.items()}


@pytest.mark.parametrize("count", [2, 5])
def test_layers_in_packages_are_those_pruned_one_after_the_other_by_hand(count):
    """Float64 throughout by hand: what is kept is the same, refitted weights to rounding."""
    denoiser = tiny_denoiser()
    config = PruneConfig(packages=count, sparsity=0.4, **SMALL)
    result = pruned(config, denoiser)
    plan = result.report.stages[0].layers
    layers = adapter_for(denoiser).layers(denoiser)
    job = prepare(denoiser, config, linear_scheduler(), tiny_batches())
    parts = engine.split_job(job, engine_units(job)).packages
    assert len(parts) == count
    hand = tiny_denoiser()
    for part in parts:
        indices = [i for unit in part for i in unit.members]
        hessians = recorded(hand, [layers[i].readers[0].name for i in indices], config, hand)
        for i in indices:
            layer, h = layers[i], hessians[layers[i].readers[0].name]
            reader = hand.get_submodule(layer.readers[0].module)
            weight = reader.weight.double()
            gone = layer.groups - plan[i].kept
            order = prune_columns(weight, h, group_size=layer.width).order[0]
            kept = layer.columns(order[gone:].sort().values)
            found = result.denoiser.info.kept[0].get(layer.name, torch.arange(layer.groups))
            assert torch.equal(layer.columns(found), kept), layer.name
            damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
            fitted = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T).T
            weight = torch.zeros_like(weight)
            weight[:, kept] = fitted
            reader.weight.data = weight.float()
            mine = result.denoiser.stage_models[0].get_submodule(layer.readers[0].module).weight
            torch.testing.assert_close(mine.double(), fitted, rtol=1e-3, atol=1e-4)
    x, labels = torch.randn(2, 2, 8, 8), torch.tensor([1, 2])
    arguments = {"timestep": torch.tensor([500, 500]), "class_labels": labels}
    torch.testing.assert_close(
        result.denoiser(x, **arguments).sample, hand(x, **arguments).sample, rtol=1e-3, atol=1e-4
    )


def engine_units(job):
    from mosaicdiff.packages.units import layer_units

    return layer_units(job.denoiser, job.layers)


@pytest.mark.parametrize("granularity", ["unstructured", "2:4"])
def test_linears_in_packages_are_those_pruned_by_hand(granularity):
    """With three packages, a block each: H of a block is seen through the blocks before it."""
    denoiser = tiny_denoiser()
    config = PruneConfig(packages=3, granularity=granularity, **SMALL)
    config = config if granularity == "2:4" else replace(config, sparsity=0.5)
    result = pruned(config, denoiser)
    adapter, hand = adapter_for(denoiser), tiny_denoiser()
    target = {"pattern": (2, 4)} if granularity == "2:4" else {"sparsity": 0.5}
    for block in adapter.blocks(hand):
        mine = [t for t in adapter.targets(hand) if t.name.startswith(f"{block}.")]
        hessians = recorded(hand, sorted({t.source for t in mine}), config, hand)
        for t in mine:
            linear = hand.get_submodule(t.name)
            swept = prune_weights(linear.weight.double(), hessians[t.source], **target)
            found = result.denoiser.masks[0][t.name]
            assert float((found != swept.mask).double().mean()) < 0.01, t.name
            linear.weight.data = result.denoiser.stage_models[0].get_submodule(t.name).weight
            close = torch.isclose(
                linear.weight.double(), swept.weight, rtol=1e-2, atol=1e-4 + 0.01 * 0.1
            )
            assert float(close.double().mean()) > 0.98, t.name


@pytest.mark.parametrize("granularity", SHAPES)
def test_one_package_is_what_all_at_once_gives(granularity, tmp_path):
    config = PruneConfig(granularity=granularity, **SHAPES[granularity], **SMALL)
    once = pruned(config)
    assert same(once, pruned(config, state=tmp_path / "state"))
    split = pruned(replace(config, memory="1GiB"))
    for name, tensor in tensors(once).items():
        torch.testing.assert_close(tensor, tensors(split)[name], rtol=1e-4, atol=1e-5)


def test_optimal_plans_from_curves_of_the_dense_network_and_prunes_in_packages():
    config = PruneConfig(sparsity=0.4, **SMALL | {"allocation": "optimal", "stages": 3})
    once, parts = pruned(config), pruned(replace(config, packages=3))
    for a, b in zip(once.report.stages, parts.report.stages, strict=True):
        assert [row.kept for row in a.layers] == [row.kept for row in b.layers]
    assert parts.report.packages.count == 3 and once.report.packages is None
    assert not same(once, parts)


@pytest.mark.parametrize("choice", ["nested", "shared"])
def test_choices_across_stages_hold_in_packages(choice):
    config = PruneConfig(
        sparsity=0.4, choice=choice, packages=2, samples=32, steps=20, allocation="uniform"
    )
    info = pruned(config).denoiser.info
    for name in info.kept[0]:
        kept = sorted((set(row[name].tolist()) for row in info.kept), key=len)
        assert all(small <= large for small, large in zip(kept, kept[1:], strict=False))


@pytest.mark.parametrize("activations", ["noised", "trajectory"])
@pytest.mark.parametrize("stages", [1, 3])
def test_the_sums_stay_under_the_memory_that_is_allowed(stages, activations):
    config = PruneConfig(
        sparsity=0.4, packages=6, samples=32, steps=6, stages=stages, allocation="uniform",
        activations=activations,
        trajectory={"samples": 4, "batch_size": 2} if activations == "trajectory" else {},
    )  # fmt: skip

    def taken(config):
        model = tiny_pipeline(tiny_denoiser())
        calibration = None if activations == "trajectory" else tiny_batches()
        return mosaicdiff.prune(model, config, calibration=calibration).report.packages

    least = taken(config).expected_bytes
    report = taken(replace(config, packages="auto", memory=least))
    assert report.count > 1
    assert 0 < report.accumulator_bytes <= report.expected_bytes <= report.memory == least


#: The command, that ends by SIGKILL in the middle of calibrating the third package.
KILLED = """
import os, signal, sys
from mosaicdiff.packages import engine
from mosaicdiff.cli import main
collect, calls = engine.collect, 0
def kill(*arguments):
    global calls
    calls += 1
    if calls == 3:
        from mosaicdiff.statistics import noising
        def die(*arguments, **named):
            os.kill(os.getpid(), signal.SIGKILL)
        noising.HessianBank.update = die
    return collect(*arguments)
engine.collect = kill
main(sys.argv[1:])
"""


def options(tiny, output, *more):
    return ("prune", *tiny.options, "--sparsity", "40%", "--packages", 5, "--allocation",
            "uniform", "--output", output, *more)  # fmt: skip


@pytest.mark.parametrize("more", [(), ("--granularity", "unstructured")], ids=["layers", "weights"])
def test_a_killed_run_goes_on_to_the_same_bits(tiny, tmp_path, more):
    command = [str(part) for part in options(tiny, tmp_path / "out", *more)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *command], env=environment, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = tmp_path / "out.packages"
    names = {path.name for path in state.iterdir()}
    assert {"package-1.safetensors", "package-2.safetensors"} <= names
    assert "package-3.safetensors" not in names and not (tmp_path / "out").exists()
    refused("holds the packages of a run that was not finished", *command)
    run_json(*command, "--resume", state)
    assert not state.exists()
    run_json(*options(tiny, tmp_path / "whole", *more))
    resumed, whole = stored(tmp_path / "out"), stored(tmp_path / "whole")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    """A state whose last package is missing, as a killed run leaves it."""
    folder = tmp_path_factory.mktemp("begun")
    config = PruneConfig(packages=3, sparsity=0.4, **SMALL)
    pruned(config, state=folder / "state")
    (folder / "state" / "package-3.safetensors").unlink()
    return folder / "state"


def copied(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "state")
    return tmp_path / "state"


def test_a_state_goes_on(begun, tmp_path):
    config = PruneConfig(packages=3, sparsity=0.4, **SMALL)
    assert same(pruned(config), pruned(config, resume=copied(begun, tmp_path)))


@pytest.mark.parametrize(
    "fields, difference",
    [
        ({"seed": 1}, r"the configuration \(seed\)"),
        ({"sparsity": 0.3}, r"the configuration \(sparsity\)"),
        ({"packages": 2}, r"the configuration \(packages\) and the packages"),
    ],
)
def test_a_state_of_another_configuration_is_refused(begun, tmp_path, fields, difference):
    config = replace(PruneConfig(packages=3, sparsity=0.4, **SMALL), **fields)
    with pytest.raises(ValueError, match=f"must be of this request, but {difference} differ"):
        pruned(config, resume=copied(begun, tmp_path))


def test_a_state_of_another_model_or_calibration_is_refused(begun, tmp_path):
    config, other = PruneConfig(packages=3, sparsity=0.4, **SMALL), tiny_denoiser()
    other.proj_out_2.weight.data += 1
    state = copied(begun, tmp_path)
    with pytest.raises(ValueError, match="but the model's weights differ"):
        pruned(config, other, resume=state)
    with pytest.raises(ValueError, match="but the calibration inputs differ"):
        mosaicdiff.prune(
            tiny_denoiser(), config, scheduler=linear_scheduler(), calibration=tiny_batches(40),
            resume=state,
        )  # fmt: skip
    text = (state / "state.json").read_text()
    (state / "state.json").write_text(text.replace('"code": "', '"code": "9'))
    with pytest.raises(ValueError, match="but the version of mosaicdiff differ"):
        pruned(config, resume=state)


def test_what_is_no_state_is_refused(begun, tmp_path):
    config = PruneConfig(packages=3, sparsity=0.4, **SMALL)
    with pytest.raises(ValueError, match="resume must name a folder that pruning in packages"):
        pruned(config, resume=tmp_path / "nothing")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("!")
    with pytest.raises(ValueError, match="but it holds something else"):
        pruned(config, state=tmp_path / "mine")
    state = copied(begun, tmp_path)
    with pytest.raises(ValueError, match="state must be left out with resume"):
        pruned(config, state=state, resume=state)
    with pytest.raises(ValueError, match="quality must not measure the whole network at once"):
        pruned(PruneConfig(quality=0.01), state=tmp_path / "new")
    file = state / "package-2.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="package-2.safetensors must be as it was written"):
        pruned(config, resume=state)
    (state / "state.json").write_text("{")
    with pytest.raises(ValueError, match="could not be read"):
        pruned(config, resume=state)


def test_a_dry_run_tells_the_packages(tiny):
    told = run_json("prune", *tiny.options, "--packages", "6", "--dry-run")
    assert told["packages"]["count"] == 6
    memory = told["packages"]["bytes"]
    options = ("--packages", "auto", "--memory", f"{memory}B", "--dry-run")
    told = run_json("prune", *tiny.options, *options)
    assert 1 < told["packages"]["count"] and told["packages"]["bytes"] <= memory
    result = run("prune", *tiny.options, "--granularity", "2:4", "--dry-run")
    assert "2:4: 50.00% of the weights of 18 linears" in result.stdout, result.output
    refused("memory must be at least", "prune", *tiny.options, "--packages", "auto",
            "--memory", "1kB", "--dry-run")  # fmt: skip
