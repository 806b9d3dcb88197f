"""Scales and their ticks."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mosaicdiff.page.svg import Scale, decades, even_range, round_step

numbers = st.floats(-1e6, 1e6)


@given(numbers, numbers, st.integers(2, 9))
def test_ticks_are_round_few_and_in_range(low, high, count):
    low, high = sorted((low, high))
    assume(high - low > 1e-6 * max(abs(low), abs(high), 1))
    ticks = Scale(low, high, 0, 100).ticks(count)
    room = 1e-6 * (high - low) + 1e-9 * max(abs(low), abs(high))
    assert len(ticks) <= count + 1
    assert all(low - room <= tick <= high + room for tick in ticks)


@given(st.lists(st.floats(1e-12, 1.0), min_size=1))
def test_decades_hold_the_values_that_count(values):
    low, high = decades(values)
    assert low <= max(min(values), 1e-6 * max(values)) * (1 + 1e-9)
    assert max(values) <= high * (1 + 1e-9)
    assert all(
        abs(math.log10(tick) - round(math.log10(tick))) < 1e-9
        for tick in Scale(low, high, 0, 1, True).ticks()
    )


def test_scales_map_ends_to_ends():
    even, log = Scale(2, 6, 10, 30), Scale(1e-4, 1, 100, 0, True)
    assert (even(2), even(4), even(6)) == (10, 20, 30)
    assert [log(value) for value in (1e-4, 1e-2, 1)] == pytest.approx([100, 50, 0])
    assert Scale(3, 3, 0, 10)(3) == 5


def test_steps_are_round():
    assert [round_step(x) for x in (0.011, 0.2, 0.21, 3, 7)] == pytest.approx(
        [0.02, 0.2, 0.5, 5, 10]
    )


def test_ranges_begin_at_zero_where_that_is_near():
    assert even_range([0.1, 1.0])[0] == 0
    assert 2.5 < even_range([2.7, 4.4])[0] < 2.7
    assert even_range([0.0])[1] > 0
