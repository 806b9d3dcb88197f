"""The CUDA walk without a GPU, run on the CPU; test_cuda.py compiles it, and sanitizes it."""

import ctypes

import pytest
import torch
from host_builds import host_library, needs_compiler

import mosaic_kernels as mk
from mosaic_kernels import _walk


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return host_library("sweep_host", tmp_path_factory.mktemp("host"))


@pytest.fixture
def steps_host(library):
    """Return the steps of a CUDA device, with the walk run by host threads."""

    def walk(state, begin, end):
        batch, m, n = state.weight.shape
        weight, factor, *others = _walk.addresses(state)
        fields = [factor, weight, *others, m, n, begin, end - begin, state.keep, state.of]
        struct = (ctypes.c_int64 * len(fields))(*fields)
        bits = 8 * state.weight.element_size()
        getattr(library, f"sweep_block_host_f{bits}")(struct, ctypes.c_int64(batch))

    return _walk.Steps(_walk.choose_torch, walk)


# (batch, rows, columns, sparsity or pattern, block size): rows beside a multiple of the threads,
# columns beside a multiple of the registers, groups wider than them, pieces of U beyond one
CASES = [
    (1, 1, 1, 0.5, 128),
    (2, 9, 75, 0.5, 32),
    (1, 16, 100, 0.9, 100),
    (2, 5, 64, (2, 4), 32),
    (1, 11, 45, (1, 3), 45),
    (1, 3, 80, (7, 20), 40),
    (1, 9, 160, (60, 80), 160),
]


@needs_compiler
@pytest.mark.parametrize("batch, m, n, target, block_size", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_on_the_host(batch, m, n, target, block_size, dtype, steps_host, make_layer, monkeypatch):
    weight, h = make_layer(batch, m, n, dtype)
    share = {"pattern" if isinstance(target, tuple) else "sparsity": target}
    expected = mk.prune_weights(weight, h, block_size=block_size, **share)
    # The factor is the CPU's in both: only the walk is under test.
    monkeypatch.setattr(_walk, "STEPS_CPU", steps_host)
    result = mk.prune_weights(weight, h, block_size=block_size, **share)
    assert torch.equal(result.mask.sum((1, 2)), expected.mask.sum((1, 2)))
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(result.losses, expected.losses, rtol=rtol, atol=0)
    if dtype == torch.float64:
        assert torch.equal(result.mask, expected.mask)
        torch.testing.assert_close(result.weight, expected.weight, rtol=1e-9, atol=1e-9)


@needs_compiler
def test_ties_on_the_host(steps_host, monkeypatch):
    monkeypatch.setattr(_walk, "STEPS_CPU", steps_host)
    result = mk.prune_weights(torch.ones(3, 40), torch.eye(40), pattern=(3, 8))
    assert result.mask.tolist() == [[i % 8 >= 5 for i in range(40)]] * 3
    half = mk.prune_weights(torch.ones(3, 40), torch.eye(40), sparsity=0.5)
    assert half.mask.flatten().tolist() == [False] * 60 + [True] * 60
