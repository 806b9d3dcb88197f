"""Layer error beside the published way: never worse on the whole, nowhere by much."""

import pytest

from benchmarks.bench_errors import SPARSITIES, summary, synthetic_layers
from benchmarks.layers import embedded_layers


@pytest.fixture(scope="module")
def kinds():
    return {"embedded": embedded_layers(samples=64, stages=1), "synthetic": synthetic_layers(4)}


@pytest.mark.parametrize("kind", ["embedded", "synthetic"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_against_reinversion_in_rounds(kind, sparsity, kinds):
    mean, _, largest = summary(kinds[kind], sparsity)
    assert mean <= 1.0
    assert largest <= 1.05
