"""`round_to="auto"`: the finest widths that are worth their time, whatever the noise."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.allocation import units as units_module
from mosaicdiff.allocation.items import allowed_levels
from mosaicdiff.allocation.latency import LayerShape, shape_of
from mosaicdiff.allocation.units import (
    ANCHORS,
    UNITS,
    fitting_unit,
    measure_units,
    penalties_of,
    tried_widths,
    with_units,
)
from mosaicdiff.pipeline import cut

from .commands import run, run_json
from .conftest import linear_scheduler, tiny_denoiser

NEURONS = UNITS["neurons"]


def rounds_of(cost, places, noise=0.0, count=9, seed=0):
    """Times of all widths by a cost model, each round a little slower, with noise."""
    generator = np.random.default_rng(seed)
    widths = [n for low, between, high in places
              for n in (low, *(w for row in between.values() for w in row), high)]  # fmt: skip
    return [
        {n: cost(n) * (1 + 0.1 * k) * (1 + noise * generator.standard_normal()) for n in widths}
        for k in range(count)
    ]


def tiles(tile, flat=50.0):
    return lambda n: flat + tile * -(-n // tile)


def unit_for(cost, noise=0.0, seed=0, groups=4608):
    places = tried_widths(groups, NEURONS)
    return fitting_unit(penalties_of(places, rounds_of(cost, places, noise, seed=seed)))


def test_a_straight_line_leaves_all_choice():
    assert unit_for(lambda n: 50 + n) == 1


@pytest.mark.parametrize("tile, found", [(8, 1), (16, 1), (64, 32), (128, 128)])
def test_whole_tiles_that_cost_are_found(tile, found):
    """Of small tiles the steps are nothing beside the layer; half of 64 is 1.1% of its middle."""
    assert unit_for(tiles(tile)) == found


@pytest.mark.parametrize("unit", [4, 8, 32, 64, 128])
def test_unaligned_widths_that_cost_are_avoided(unit):
    def cost(n):
        return (50 + n) * (1.2 if n % unit else 1.0)

    assert unit_for(cost) == unit


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_decide(seed):
    def cost(n):
        return (50 + n) * (1.2 if n % 8 else 1.0)

    assert unit_for(cost, noise=0.03, seed=seed) == 8
    assert unit_for(lambda n: 50 + n, noise=0.02, seed=seed) == 1


def test_a_coarser_unit_is_never_the_dearer_one():
    """One that seems so is pooled with its neighbours."""
    assert fitting_unit({1: 0.2, 8: 0.001, 16: 0.02, 32: 0.0, 64: 0.0, 128: 0.0}) == 8
    assert fitting_unit({1: 0.2, 8: 0.1, 16: 0.1, 32: 0.1, 64: 0.1, 128: 0.0}) == 128


@given(st.integers(1, 20000), st.sampled_from(list(UNITS)))
def test_widths_are_tried_within_the_layer(groups, kind):
    places = tried_widths(groups, UNITS[kind])
    assert len(places) <= len(ANCHORS)
    for low, between, high in places:
        assert 0 < low < high <= groups and low % UNITS[kind][-1] == 0
        for unit, widths in between.items():
            assert all(low < n < high and n % unit == 0 and n % (2 * unit) for n in widths)


def shapes(denoiser):
    return {
        layer.kind: shape_of(denoiser, layer) for layer in adapter_for(denoiser).layers(denoiser)
    }


def wide_denoiser():
    """Two blocks with 512 neurons each."""
    return mosaicdiff.load_pipeline("digits").transformer


def test_measuring_times_what_would_run():
    dense = wide_denoiser()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    timed = []

    def timer(call):
        call()
        width = call.func.net[2].in_features if hasattr(call.func, "net") else call.func.heads
        timed.append(width)
        return (50 + width) * (1.3 if hasattr(call.func, "net") and width % 16 else 1.0)

    told = []
    found = measure_units(
        dense, adapter_for(dense), batch_size=2, repeats=3, timer=timer,
        advance=lambda: told.append(1),
    )  # fmt: skip
    kinds = shapes(dense)
    assert found == {kinds["heads"]: 1, kinds["neurons"]: 16}
    assert len(timed) == 4 * len(set(timed)) and told
    after = dense.state_dict()
    assert all(bool((before[name] == after[name]).all()) for name in before)


def test_units_are_measured_once(monkeypatch, tmp_path):
    dense, adapter = wide_denoiser(), adapter_for(wide_denoiser())
    layers = adapter.layers(dense)
    calls = []

    def measured(*args, **kwargs):
        calls.append(kwargs)
        return {shape: 4 if shape.kind == "heads" else 32 for shape in shapes(dense).values()}

    monkeypatch.setattr(units_module, "measure_units", measured)
    for _ in range(2):
        found = with_units(layers, dense, adapter, batch_size=3, cache=tmp_path)
        assert [layer.unit for layer in found] == [4, 32] * 6
        assert [replace(layer, unit=1) for layer in found] == list(layers)
    assert len(calls) == 1 and calls[0]["batch_size"] == 3
    with_units(layers, dense, adapter, batch_size=4, cache=tmp_path)
    with_units(layers, dense, adapter, cache=None)
    assert len(calls) == 3
    (path, *_) = tmp_path.iterdir()
    path.write_text("{}[")
    with pytest.raises(
        ValueError, match="must hold the units measured for round_to 'auto'.*Delete"
    ):
        for batch in (3, 4):
            with_units(layers, dense, adapter, batch_size=batch, cache=tmp_path)


def test_nothing_is_timed_on_the_meta_device():
    dense = tiny_denoiser().to("meta")
    config = PruneConfig(sparsity=0.3, round_to="auto", allocation="score")
    with pytest.raises(ValueError, match="round_to must be a number where nothing can be timed"):
        cut(dense, config, scheduler=linear_scheduler())


@pytest.fixture
def known_units(monkeypatch):
    """A device on which heads come in twos and neurons in sixteens."""

    def measured(denoiser, adapter, **kwargs):
        return {shape: 2 if shape.kind == "heads" else 16 for shape in shapes(denoiser).values()}

    monkeypatch.setattr(units_module, "measure_units", measured)
    monkeypatch.setattr(units_module, "user_cache", lambda: pytest.fail("not in tests"))
    monkeypatch.setattr(units_module.with_units, "__kwdefaults__",
                        units_module.with_units.__kwdefaults__ | {"cache": None})  # fmt: skip


@pytest.mark.parametrize("allocation", ["optimal", "score"])
@pytest.mark.parametrize("sparsity", [0.2, 0.33, 0.5])
def test_the_mean_stays_on_target(known_units, allocation, sparsity):
    pipe = mosaicdiff.load_pipeline("digits")
    config = PruneConfig(sparsity=sparsity, round_to="auto", allocation="score", steps=20)
    if allocation == "score":
        staged = cut(pipe.transformer, config, scheduler=pipe.scheduler)
    else:
        config = replace(config, allocation="optimal", samples=32, weighting="raw")
        staged = mosaicdiff.prune(pipe, config).denoiser
    info = staged.info
    prunable = sum(layer.groups * layer.cost for layer in info.layers)
    gone = 0.0
    for kept, steps in zip(info.kept, info.steps, strict=True):
        for layer in info.layers:
            count = len(kept.get(layer.name, range(layer.groups)))
            unit = 2 if layer.kind == "heads" else 16
            assert count % unit == 0 or count == layer.groups
            gone += steps * (layer.groups - count) * layer.cost
    assert gone / prunable / sum(info.steps) == pytest.approx(sparsity, abs=0.005)


def test_levels_follow_the_layers_unit():
    layer = replace(adapter_for(tiny_denoiser()).layers(tiny_denoiser())[0], unit=2)
    assert allowed_levels(layer, PruneConfig(round_to="auto")) == [0, 2, 4]
    assert allowed_levels(layer, PruneConfig(round_to=2)) == [0, 1, 2, 3, 4]


def test_the_configuration_keeps_it(tmp_path):
    config = PruneConfig(round_to="auto")
    assert PruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="round_to must be a whole number"):
        PruneConfig(round_to="fast")


def test_prune_by_the_command(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "out"
    asked = (*tiny.options, "--sparsity", "0.3", "--round-to", "auto")
    run_json("prune", *asked, "--output", output)
    shown = run("prune", *asked, "--output", tmp_path / "again").output
    assert "worth their time on this device: heads in " in shown
    config = json.loads((output / "transformer" / "config.json").read_text())
    assert config["prune_config"]["round_to"] == "auto"
    (stored,) = (tmp_path / "cache" / "mosaicdiff" / "latency").iterdir()
    rows = json.loads(stored.read_text())
    assert {LayerShape(**r["shape"] | {"inputs": ()}).kind for r in rows} == {"heads", "neurons"}
