"""The path of least error per saving, against every combination of levels."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicdiff.allocation.optimal import Item, OptimalPath, lower_hull

STAGES, LAYERS = 2, 3
#: Of savings, as a share of all there is: what is smaller counts as rounding.
TOLERANCE = 2e-9


def make_item(stage, layer, errors, savings, share=1.0):
    """An item whose level n removes n groups and n / most of `share` of its stage."""
    most = max(1, len(errors) - 1)
    return Item(
        ((stage, layer),),
        np.arange(len(errors))[:, None],
        np.asarray(errors, dtype=float),
        np.asarray(savings, dtype=float),
        {stage: share * np.arange(len(errors)) / most},
    )


def random_items(seed, convex, stages=STAGES, layers=LAYERS):
    rng = np.random.default_rng(seed)
    items = []
    for stage, layer in itertools.product(range(stages), range(layers)):
        levels = rng.integers(3, 5)
        steps = rng.exponential(size=levels) * rng.choice([0.1, 1.0, 10.0])
        each = rng.uniform(0.5, 2.0)
        items.append(
            make_item(
                stage,
                layer,
                np.concatenate([[0.0], np.cumsum(np.sort(steps) if convex else steps)]),
                each * np.arange(levels + 1),
                1 / layers,
            )
        )
    return items


def saved_by(items, levels):
    return sum(float(item.savings[n]) for item, n in zip(items, levels, strict=True))


def least_error(items, saving):
    """The least error of all combinations that save so much, and of all that there are."""
    errors, savings = np.zeros(1), np.zeros(1)
    for item in items:
        errors = (errors[:, None] + item.errors).ravel()
        savings = (savings[:, None] + item.savings).ravel()
    return errors[savings >= saving * (1 - 1e-12)].min()


def relaxed(items, saving):
    """The least error where levels may be mixed: whole steps of the hulls, and part of one."""
    steps = []
    for item in items:
        hull = lower_hull(item.savings, item.errors)
        for a, b in itertools.pairwise(hull):
            steps.append((item.errors[b] - item.errors[a], item.savings[b] - item.savings[a]))
    error = 0.0
    for loss, gain in sorted(steps, key=lambda step: step[0] / step[1]):
        part = min(1.0, saving / gain)
        error, saving = error + part * loss, saving - part * gain
        if part < 1:
            return error, loss - part * loss
    return error, 0.0


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_the_error_exceeds_the_best_by_less_than_its_last_step(seed, convex):
    items = random_items(seed, convex)
    path = OptimalPath(items, STAGES, LAYERS)
    for share in (0.13, 0.37, 0.5, 0.71, 0.93):
        saving = share * path.total
        levels = path.levels(saving)
        assert saved_by(items, levels) >= saving * (1 - 1e-9)
        best = least_error(items, saving)
        bound, rest = relaxed(items, saving)
        # Any choice costs at least the relaxed one, whose whole steps the path takes too: what
        # differs is the last step, taken whole (or bettered) instead of in part.
        assert bound <= best + 1e-9
        assert best - 1e-9 <= path.error(levels) <= bound + rest + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_whole_steps_of_convex_curves_are_the_best_there_is(seed):
    items = random_items(seed, convex=True)
    path = OptimalPath(items, STAGES, LAYERS)
    slopes = sorted(
        ((e[n + 1] - e[n]) / (s[n + 1] - s[n]), i, s[n + 1] - s[n])
        for i, (e, s) in enumerate((item.errors, item.savings) for item in items)
        for n in range(len(e) - 1)
    )
    saving = 0.0
    for count, (_, _, gain) in enumerate(slopes, start=1):
        saving += gain
        levels = path.levels(saving)
        assert levels.sum() == count
        assert path.error(levels) == pytest.approx(least_error(items, saving), rel=1e-9)


@given(st.integers(0, 10**6), st.booleans(), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_more_effort_saves_more_up_to_the_last_step(seed, convex, efforts):
    items = random_items(seed, convex)
    path = OptimalPath(items, STAGES, LAYERS)
    largest = max(float(item.savings[-1]) for item in items)
    for effort in sorted(efforts):
        saved = saved_by(items, path.levels(effort * path.total))
        assert saved >= effort * path.total - TOLERANCE * path.total
        assert saved <= effort * path.total + largest
    assert path.at(0.0) == ((0,) * LAYERS,) * STAGES
    everything = [[len(items[k * LAYERS + i].errors) - 1 for i in range(LAYERS)] for k in range(2)]
    assert [list(row) for row in path.at(1.0)] == everything


@given(st.integers(0, 10**6), st.booleans(), st.floats(0.2, 1), st.floats(0, 1))
def test_no_stage_gives_more_than_its_cap(seed, convex, cap, effort):
    items = random_items(seed, convex)
    path = OptimalPath(items, STAGES, LAYERS, max_share=cap)
    levels = path.levels(effort * path.total)
    assert saved_by(items, levels) >= effort * path.total - TOLERANCE * max(1, path.total)
    for stage in range(STAGES):
        used = sum(
            float(item.shares[stage][n])
            for item, n in zip(items, levels, strict=True)
            if stage in item.shares
        )
        assert used <= cap + 1e-8


def test_a_cap_binds_where_it_should():
    cheap, dear = ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]), ([0.0, 50.0, 100.0], [0.0, 1.0, 2.0])
    items = [make_item(0, 0, *cheap), make_item(1, 1, *dear)]
    assert OptimalPath(items, 2, 2).removed(OptimalPath(items, 2, 2).levels(2.0))[0][0] == 2
    capped = OptimalPath(items, 2, 2, max_share=0.5)
    assert capped.total == 2.0
    assert capped.at(1.0) == ((1, 0), (0, 1))


@given(st.integers(0, 10**6), st.booleans(), st.floats(0, 1), st.randoms(use_true_random=False))
def test_evening_out_gives_back_but_never_below_the_target(seed, convex, share, random):
    items = random_items(seed, convex)
    path = OptimalPath(items, STAGES, LAYERS)
    levels = np.array([random.randrange(len(item.errors)) for item in items])
    before, saving = saved_by(items, levels), share * path.total
    error = path.error(levels)
    path.even_out(levels, saving)
    after = saved_by(items, levels)
    assert after >= saving - TOLERANCE * path.total
    if before >= saving:
        assert after <= before and path.error(levels) <= error
    # No step that is left could be given back.
    for item, n in zip(items, levels, strict=True):
        if n and before >= saving and item.errors[n] > item.errors[n - 1]:
            step = item.savings[n] - item.savings[n - 1]
            assert after - step < saving + TOLERANCE * path.total


def test_what_no_item_can_save_alone_is_taken_from_several():
    items = [make_item(0, i, [0.0, float(i + 1)], [0.0, 1.0], 1 / 3) for i in range(3)]
    path, levels = OptimalPath(items, 1, 3), np.zeros(3, dtype=np.int64)
    path.even_out(levels, 2.0)
    assert levels.tolist() == [1, 1, 0]


def test_evening_out_keeps_under_the_cap():
    items = [make_item(0, 0, [0, 1, 2], [0, 1, 2]), make_item(1, 1, [0, 10, 20], [0, 1, 2])]
    path = OptimalPath(items, 2, 2, max_share=0.5)
    levels = np.array([1, 0])
    path.even_out(levels, 2.0)
    assert levels.tolist() == [1, 1]


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(-5, 5)), min_size=1, max_size=12))
def test_no_point_lies_under_the_hull(points):
    x = np.cumsum([p[0] for p in points])
    y = np.array([p[1] for p in points])
    hull = lower_hull(x, y)
    assert hull[0] == 0 and hull == sorted(set(hull))
    assert x[hull[-1]] == x[-1]
    for i, (at, value) in enumerate(zip(x, y, strict=True)):
        if i == 0 or at > x[0]:
            assert value >= np.interp(at, x[hull], y[hull]) - 1e-9


def test_a_straight_curve_is_taken_whole_whatever_its_rounding():
    for loss, gain in itertools.product((0.1, 0.3, 0.7, 1.1), (0.1, 1.0, 3.3)):
        errors, savings = (np.concatenate([[0.0], np.full(60, n).cumsum()]) for n in (loss, gain))
        items = [make_item(0, 0, errors, savings, 0.5), make_item(0, 1, errors, savings, 0.5)]
        path = OptimalPath(items, 1, 2)
        assert path.at(1.0) == ((60, 60),)
        for effort in np.linspace(0, 1, 41):
            levels = path.levels(effort * path.total)
            assert saved_by(items, levels) >= effort * path.total * (1 - 1e-9)


def test_a_deep_wide_model_is_planned_in_seconds():
    rng = np.random.default_rng(0)
    items = [
        make_item(0, i, np.concatenate([[0.0], rng.exponential(size=4608).cumsum()]),
                  np.arange(4609.0), 1 / 84)
        for i in range(84)
    ]  # fmt: skip
    started = time.perf_counter()
    path = OptimalPath(items, 1, 84)
    levels = path.levels(0.4 * path.total)
    assert time.perf_counter() - started < 5
    assert saved_by(items, levels) == pytest.approx(0.4 * path.total, rel=1e-3)
