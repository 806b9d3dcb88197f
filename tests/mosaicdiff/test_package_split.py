"""How a network is split, and what a memory budget allows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.packages.memory import MemoryModel, make_packages
from mosaicdiff.packages.units import Unit, layer_units, split, target_units

from .conftest import linear_scheduler, tiny_batches, tiny_denoiser

MODELS = [MemoryModel(stages, at_once, together) for stages in (1, 3) for at_once in (True, False)
          for together in (True, False)]  # fmt: skip


def units_of(works):
    return [
        Unit((i,), {f"layer{i}": 8 + 4 * i}, float(work), 16 * (8 + 4 * i) ** 2)
        for i, work in enumerate(works)
    ]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.data())
def test_packages_are_runs_of_about_equal_work(works, data):
    units = units_of(works)
    count = data.draw(st.integers(1, len(units)))
    parts = split(units, count)
    assert [unit for part in parts for unit in part] == units
    assert len(parts) == count and all(parts)
    # An edge lies where the work before it is nearest to its share, so it is off by half of a
    # unit at most; where whole packages must be kept for the edges beside it, by as many units.
    if max(works) * count <= sum(works) / 2:
        fair = sum(works) / count
        assert all(abs(sum(u.work for u in part) - fair) <= max(works) for part in parts)


def test_linears_that_share_an_input_are_one_unit():
    denoiser = tiny_denoiser()
    adapter = adapter_for(denoiser)
    targets = adapter.targets(denoiser)
    units = target_units(denoiser, targets)
    names = [[targets[i].name.rpartition("attn1.")[2] for i in unit.members] for unit in units]
    assert names[0] == ["to_q", "to_k", "to_v"] and len(units) == 3 * 4
    assert list(units[0].widths) == ["transformer_blocks.0.attn1.to_q"]
    assert [i for unit in units for i in unit.members] == list(range(len(targets)))


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_auto_is_the_fewest_that_fit(model):
    units = units_of([5, 1, 8, 3, 9, 2, 7, 4])
    least = max(model.package([unit]) for unit in units)
    for memory in range(least, 2 * model.package(units), max(1, model.package(units) // 50)):
        parts = make_packages(units, "auto", memory, model)
        assert max(model.package(part) for part in parts) <= memory
        if len(parts) > 1:
            fewer = split(units, len(parts) - 1)
            assert max(model.package(part) for part in fewer) > memory
    assert len(make_packages(units, "auto", 10 * model.package(units), model)) == 1


def test_what_no_package_can_meet_says_the_least_that_would():
    model, units = MODELS[0], units_of([1, 1, 1])
    least = max(model.package([unit]) for unit in units)
    with pytest.raises(ValueError, match=r"memory must be at least .* got 1\.00KiB. Allow") as told:
        make_packages(units, "auto", 1024, model)
    stated = str(told.value).split("at least ")[1].split(" ")[0]
    enough = PruneConfig(packages="auto", memory=stated).memory_bytes
    assert least <= enough <= 1.01 * least
    make_packages(units, "auto", enough, model)


def test_too_few_packages_for_a_memory_say_how_many_would_do():
    model, units = MODELS[0], units_of([1, 1, 1])
    memory = max(model.package([unit]) for unit in units)
    with pytest.raises(ValueError, match="packages must be at least 3 to fit"):
        make_packages(units, 1, memory, model)
    assert len(make_packages(units, 3, memory, model)) == 3


def test_more_packages_than_layers_are_refused():
    with pytest.raises(ValueError, match="packages must be at most 6, one for each layer"):
        mosaicdiff.prune(
            tiny_denoiser(), PruneConfig(packages=7, allocation="uniform"),
            scheduler=linear_scheduler(), calibration=tiny_batches(),
        )  # fmt: skip


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"packages": 0}, "packages must be a whole number of at least 1, or auto"),
        ({"packages": "all"}, "packages must be a whole number of at least 1, or auto"),
        ({"packages": "auto"}, "memory must be given with packages='auto'"),
        ({"memory": "much"}, "memory must be such as 20GiB"),
        ({"memory": "0.5x"}, "memory must be such as 20GiB"),
        ({"packages": 2, "quality": 0.01}, "packages must be 1 and memory None with quality=0.01"),
        ({"memory": "1GiB", "latency": "0.7x"}, "memory None with latency='0.7x'"),
        ({"packages": 2, "stages": "auto"}, "packages must be 1 and memory None with stages="),
        ({"packages": 2, "allocation": "evolutionary"}, "memory None with allocation="),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**fields)


def test_units_hold_what_layers_need():
    denoiser = tiny_denoiser()
    units = layer_units(denoiser, adapter_for(denoiser).layers(denoiser))
    assert [list(unit.widths.values()) for unit in units[:2]] == [[32], [128]]
    assert all(unit.workspace > 8 * max(unit.widths.values()) ** 2 for unit in units)
    assert torch.tensor([unit.work for unit in units]).min() > 0
