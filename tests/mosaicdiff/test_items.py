"""Which levels a request allows, and which layers are decided over together."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.allocation.items import allowed_levels, make_items
from mosaicdiff.groups import Columns, PrunableLayer, Rows
from mosaicdiff.patterns import check_patterns

from .conftest import linear_scheduler, tiny_batches, tiny_denoiser

HEADS = PrunableLayer("blocks.0.attn1", "heads", (Columns("r"),), (Rows("w"),), 8, 4, 40)
NEURONS = PrunableLayer("blocks.0.ff", "neurons", (Columns("r"),), (Rows("w"),), 100, 1, 2)
LAYERS = [
    replace(row, name=row.name.replace("0", str(block)))
    for block in range(2)
    for row in (HEADS, NEURONS)
]
SMALL = {"samples": 32, "steps": 20}


@given(st.integers(1, 100), st.integers(0, 100))
def test_kept_neurons_are_multiples_of_enough(unit, least):
    removed = allowed_levels(NEURONS, PruneConfig(round_to=unit, least_neurons=least))
    kept = [100 - n for n in removed]
    assert removed[0] == 0 and removed == sorted(set(removed))
    assert set(kept) == {100} | {n for n in range(least, 101) if n % unit == 0}


def test_heads_are_not_rounded_but_keep_the_least():
    config = PruneConfig(round_to=64, least_heads=3)
    assert allowed_levels(HEADS, config) == [0, 1, 2, 3, 4, 5]


def test_a_least_above_the_width_is_refused():
    with pytest.raises(ValueError, match="least_heads must be at most 8, the heads of blocks.0"):
        allowed_levels(HEADS, PruneConfig(least_heads=9))
    with pytest.raises(ValueError, match="least_neurons must be at most 100"):
        allowed_levels(NEURONS, PruneConfig(least_neurons=101))


@pytest.mark.parametrize("granularity", ["layers", "blocks"])
def test_whole_layers_go_or_stay(granularity):
    config = PruneConfig(granularity=granularity, allocation="optimal", round_to=8)
    assert allowed_levels(HEADS, config) == [0, 8]
    assert allowed_levels(NEURONS, config) == [0, 100]
    assert allowed_levels(NEURONS, replace(config, least_neurons=1)) == [0]


@pytest.mark.parametrize(
    "pattern, kept",
    [
        ("blocks.1", {2, 3}),
        ("blocks.1.*", {2, 3}),
        ("blocks.?.attn1", {0, 2}),
        ("*.ff", {1, 3}),
        ("blocks.1.ff", {3}),
        ("*", {0, 1, 2, 3}),
    ],
)
def test_a_pattern_keeps_what_it_names_whole(pattern, kept):
    config = PruneConfig(exclude=(pattern,))
    check_patterns([row.name for row in LAYERS], config.exclude, "exclude")
    assert {i for i, row in enumerate(LAYERS) if allowed_levels(row, config) == [0]} == kept


@pytest.mark.parametrize("pattern", ["blocks", "blocks.2", "lock", "blocks.0.attn", "BLOCKS.0"])
def test_a_pattern_that_names_nothing_is_refused(pattern):
    config = PruneConfig(exclude=("*.ff", pattern))
    if pattern == "blocks":  # names a module above them all
        check_patterns([row.name for row in LAYERS], config.exclude, "exclude")
        return
    with pytest.raises(ValueError, match=f"nothing matches '{pattern}'. The first is 'blocks.0"):
        check_patterns([row.name for row in LAYERS], config.exclude, "exclude")


def items(config, stages=2, drops=None):
    rng = np.random.default_rng(0)
    rows = range(stages)
    errors = [
        [np.concatenate([[0], rng.exponential(size=r.groups).cumsum()]) for r in LAYERS]
        for _ in rows
    ]
    savings = [
        [(k + 1.0) * r.cost * np.arange(r.groups + 1) for r in LAYERS] for k in range(stages)
    ]
    return errors, savings, make_items(LAYERS, stages, errors, savings, config, drops)


def test_every_layer_of_every_stage_is_decided_alone():
    errors, savings, made = items(PruneConfig())
    assert [item.members for item in made] == [((k, i),) for i in range(4) for k in range(2)]
    item = made[3]  # the FFN of block 0 in stage 1
    assert (item.errors == errors[1][1]).all() and (item.savings == savings[1][1]).all()
    assert item.removed[:, 0].tolist() == list(range(101))
    assert item.shares[1][-1] == pytest.approx(100 * 2 / (2 * (8 * 40 + 100 * 2)))


def test_a_shared_choice_ties_the_stages():
    errors, savings, made = items(PruneConfig(choice="shared", allocation="optimal"))
    assert [item.members for item in made] == [((0, i), (1, i)) for i in range(4)]
    assert made[0].errors == pytest.approx(errors[0][0] + errors[1][0])
    assert made[0].savings == pytest.approx(savings[0][0] + savings[1][0])
    assert (made[0].removed[:, 0] == made[0].removed[:, 1]).all()


def test_a_block_goes_together_or_not_at_all():
    config = PruneConfig(granularity="blocks", allocation="optimal")
    errors, savings, made = items(config)
    assert [item.members for item in made] == [
        ((k, i), (k, i + 1)) for i in (0, 2) for k in range(2)
    ]
    assert made[1].removed.tolist() == [[0, 0], [8, 100]]
    assert made[1].errors[-1] == pytest.approx(errors[1][0][-1] + errors[1][1][-1])
    assert made[1].savings[-1] == pytest.approx(savings[1][0][-1] + savings[1][1][-1])
    # Half of a block that stays whole keeps the other half.
    _, _, fewer = items(replace(config, exclude=("blocks.0.ff",)))
    assert [item.members[0][1] for item in fewer] == [2, 2]


def test_measured_changes_take_the_place_of_the_curves():
    config = PruneConfig(granularity="blocks", allocation="optimal")
    drops = [{"blocks.0": 5.0, "blocks.1": 6.0}, {"blocks.0": 7.0, "blocks.1": 8.0}]
    assert [item.errors[-1] for item in items(config, drops=drops)[2]] == [5, 7, 6, 8]


def prune(**config):
    return mosaicdiff.prune(
        tiny_denoiser(), PruneConfig(**(SMALL | config)),
        scheduler=linear_scheduler(), calibration=tiny_batches(),
    )  # fmt: skip


@pytest.mark.parametrize("allocation", ["score", "uniform", "optimal"])
def test_limits_hold_in_the_pruned_denoiser(allocation):
    report = prune(
        sparsity=0.3, allocation=allocation, round_to=16, least_heads=2, least_neurons=32,
        exclude=("transformer_blocks.1.attn1",),
    ).report  # fmt: skip
    assert report.sparsity == pytest.approx(0.3, abs=0.02)
    for stage in report.stages:
        for layer in stage.layers:
            if layer.name == "transformer_blocks.1.attn1":
                assert layer.kept == layer.groups
            elif layer.kind == "heads":
                assert layer.kept >= 2
            else:
                assert layer.kept >= 32 and layer.kept % 16 == 0


@pytest.mark.parametrize("allocation", ["score", "uniform", "optimal"])
def test_more_than_what_may_go_is_refused(allocation):
    keep = ("transformer_blocks.0.*", "transformer_blocks.1.*")
    with pytest.raises(ValueError, match=r"sparsity must be at most 0\.3333 with these settings"):
        prune(sparsity=0.6, allocation=allocation, exclude=keep)


@pytest.mark.parametrize("allocation", ["uniform", "optimal"])
def test_a_shared_choice_keeps_the_same_groups_in_every_stage(allocation):
    staged = prune(sparsity=0.4, allocation=allocation, choice="shared").denoiser
    first, *others = staged.info.kept
    assert first and all(len(kept) < 128 for kept in first.values())
    for other in others:
        assert other.keys() == first.keys()
        assert all((other[name] == kept).all() for name, kept in first.items())


def test_a_shared_choice_has_no_use_for_shares_that_differ():
    with pytest.raises(ValueError, match="must be .*optimal.* with choice 'shared', got 'score'"):
        PruneConfig(choice="shared", allocation="score")


@pytest.mark.parametrize("allocation", ["score", "optimal"])
def test_a_nested_choice_keeps_some_of_what_others_keep(allocation):
    staged = prune(sparsity=0.5, allocation=allocation, choice="nested").denoiser
    differing = 0
    for layer in staged.info.layers:
        whole = set(range(layer.groups))
        sets = [
            {*kept[layer.name].tolist()} if layer.name in kept else whole
            for kept in staged.info.kept
        ]
        sets.sort(key=len)
        assert sets[0] <= sets[1] <= sets[2]
        differing += len(sets[0]) < len(sets[2])
    assert differing


def test_a_multiple_of_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match="round_to must be at most 100.*got 101.*divisor"):
        allowed_levels(NEURONS, PruneConfig(round_to=101))
