"""Budgets as users write them, and the search for the plan that meets one."""

import math

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mosaicdiff import PruneConfig
from mosaicdiff.allocation.budget import TOLERANCE, UNITS, Budget, meet


@pytest.mark.parametrize(
    "unit, given, value, relative",
    [
        ("sparsity", 0.3, 0.3, False),
        ("sparsity", "0", 0.0, False),
        ("sparsity", " 30 % ", 0.3, False),
        ("macs", "0.6x", 0.6, True),
        ("macs", "3.9T", 3.9e12, False),
        ("macs", "2B", 2e9, False),
        ("macs", "2 G", 2e9, False),
        ("macs", 5e17, 5e17, False),
        ("params", "450M", 4.5e8, False),
        ("params", "7k", 7e3, False),
        ("params", "7K", 7e3, False),
        ("params", "1e6", 1e6, False),
        ("params", ".8x", 0.8, True),
        ("size", "12B", 12.0, False),
        ("size", "3kB", 3e3, False),
        ("size", "3MB", 3e6, False),
        ("size", "1.2GB", 1.2e9, False),
        ("size", "2TB", 2e12, False),
        ("size", "3KiB", 3 * 1024.0, False),
        ("size", "3MiB", 3 * 1024.0**2, False),
        ("size", "1.5GiB", 1.5 * 1024.0**3, False),
        ("size", "1x", 1.0, True),
        ("latency", "25ms", 25.0, False),
        ("latency", "0.5s", 500.0, False),
        ("latency", "800us", 0.8, False),
        ("latency", "0.7x", 0.7, True),
        ("quality", "1%", 0.01, False),
        ("quality", 0.02, 0.02, False),
    ],
)
def test_a_budget_is_read_in_its_own_unit(unit, given, value, relative):
    budget = Budget.parse(unit, given)
    assert (budget.unit, budget.relative) == (unit, relative)
    assert budget.value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "unit, given, message",
    [
        ("flops", 1, "unit must be one of sparsity, macs, params.*got 'flops'"),
        ("macs", "3.9Q", "macs must be such as 0.6x .*got '3.9Q'"),
        ("macs", "3.9m", "macs must be such as"),
        ("macs", "30%", "macs must be such as"),
        ("params", "1GB", "params must be such as"),
        ("size", "1e9", "size must be such as 0.8x, or 1.2GB"),
        ("size", "1M", "size must be such as"),
        ("latency", 25, "latency must be such as 0.7x, or 25ms a call, got 25"),
        ("latency", "25MS", "latency must be such as"),
        ("sparsity", "0.5x", "sparsity must be such as 0.3 or 30%"),
        ("quality", "0.5x", "quality must be such as 0.01"),
        ("sparsity", "", "sparsity must be such as"),
        ("sparsity", "1.2.3", "sparsity must be such as"),
        ("sparsity", "--1", "sparsity must be such as"),
        ("sparsity", True, "sparsity must be such as"),
        ("macs", "1e999", "macs must be such as"),
        *((unit, math.nan, f"{unit} must be such as") for unit in UNITS),
        *((unit, math.inf, f"{unit} must be such as") for unit in UNITS),
        ("sparsity", -0.1, r"sparsity must be in \[0, 1\), got -0.1"),
        ("sparsity", "100%", r"sparsity must be in \[0, 1\), got 100%"),
        ("macs", "-1x", "macs must be more than 0, got -1x. E.g. 0.6x"),
        ("macs", 0, "macs must be more than 0, got 0"),
        ("params", "0x", "params must be more than 0"),
        ("size", "0GB", "size must be more than 0"),
        ("latency", "-5ms", "latency must be more than 0"),
        ("quality", 0, "quality must be more than 0"),
        ("quality", -1, "quality must be more than 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(unit, given, message):
    with pytest.raises(ValueError, match=message):
        Budget.parse(unit, given)


def test_two_units_at_once_are_refused():
    with pytest.raises(ValueError, match="must be in one unit, got macs and size. Keep the one"):
        PruneConfig(macs="0.6x", size="1GB")


def test_a_relative_budget_is_of_the_dense_model():
    assert Budget.parse("macs", "0.5x").target(6e12) == 3e12
    assert Budget.parse("macs", "5T").target(6e12) == 5e12


def test_a_budget_names_itself():
    assert str(Budget.parse("macs", "0.6x")) == "macs 0.6x"
    assert str(Budget.parse("sparsity", "30%")) == "sparsity 30%"
    assert str(Budget.parse("latency", "25ms")) == "latency 25"


@st.composite
def staircases(draw):
    """Costs that only fall with effort, from the dense one, in steps of any height."""
    falls = draw(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40))
    places = st.lists(st.integers(0, 1000), min_size=len(falls), max_size=len(falls))
    edges = [place / 1000 for place in sorted(draw(places))]
    dense = sum(falls) + draw(st.floats(0.1, 5.0))

    def cost(effort):
        return dense - sum(fall for fall, edge in zip(falls, edges, strict=True) if effort >= edge)

    return dense, cost, [cost(0.0), *(cost(edge) for edge in edges)]


@given(staircases(), st.floats(0.01, 1.2))
def test_the_closest_cost_of_a_staircase_is_met_or_named(stairs, share):
    dense, cost, levels = stairs
    wanted = share * dense
    closest = min(abs(level - wanted) for level in levels)
    assume(abs(closest - TOLERANCE * wanted) > 1e-6 * dense)
    budget = Budget("macs", share, relative=True)
    if closest <= TOLERANCE * wanted:
        found = meet(budget, dense, lambda effort: effort, cost)
        assert abs(cost(found) - wanted) <= TOLERANCE * wanted + 1e-12
    else:
        with pytest.raises(ValueError, match=r"must be within 2% of what can be had"):
            meet(budget, dense, lambda effort: effort, cost)


@given(st.floats(0, 0.9))
@example(0.0)
def test_sparsity_grows_with_effort_and_is_met(target):
    found = meet(Budget("sparsity", target), 0.0, lambda effort: effort, lambda effort: effort**2)
    assert found**2 == pytest.approx(target, rel=1e-9, abs=1e-12)


def test_what_is_out_of_reach_says_what_can_be_had():
    budget = Budget.parse("size", "1MB")
    with pytest.raises(ValueError, match="closest is 3M for the 1M asked.*reach 3M to 8M"):
        meet(budget, 8e6, lambda x: x, lambda x: 8e6 - 5e6 * x, lambda cost: f"{cost / 1e6:g}M")
