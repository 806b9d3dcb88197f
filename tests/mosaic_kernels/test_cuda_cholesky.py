"""The batched inverse of the GPU, run on the CPU with torch's leaf and with the CUDA kernel."""

import ctypes

import pytest
import torch
from host_builds import host_library, needs_compiler

import mosaic_kernels as mk
from mosaic_kernels import _damping, _inverse_batched
from mosaic_kernels.ref import cholesky_inverse_ref, damped_ref


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return host_library("cholesky_host", tmp_path_factory.mktemp("host"))


@pytest.fixture
def leaf_host(library):
    """Return the CUDA kernel for a diagonal block, run by host threads."""

    def leaf(block, failed):
        assert block.stride(2) == 1
        sizes = map(ctypes.c_int64, (*block.shape[:2], *block.stride()[:2]))
        call = getattr(library, f"invert_factor_host_f{8 * block.element_size()}")
        call(ctypes.c_void_p(block.data_ptr()), *sizes, ctypes.c_void_p(failed.data_ptr()))

    return leaf


def inverse_batched(h, damping, limit):
    return _damping.climb("f", h, damping, limit, _inverse_batched.invert_by_factors)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch, width", [(1, 1), (2, 2), (3, 7), (2, 33), (1, 128)])
def test_leaf_on_the_host(batch, width, dtype, leaf_host, make_layer, check_error):
    h = make_layer(batch, 1, width, dtype)[1]
    room = torch.full((batch, width + 3, width + 5), 7.0, dtype=dtype)
    block = room[:, 1 : width + 1, 2 : width + 2]
    block.copy_(h.tril() + 9 * torch.ones_like(h).triu(1))  # the upper triangle is not read
    failed = torch.zeros(batch, dtype=torch.bool)
    leaf_host(block, failed)
    assert not failed.any() and not block.triu(1).any()
    truth = torch.linalg.inv(torch.linalg.cholesky(h.double()))
    if dtype == torch.float64:  # which is all the truth there is
        torch.testing.assert_close(block, truth, rtol=1e-9, atol=1e-9)
    else:
        identity = torch.eye(width).expand_as(h)
        by_torch = torch.linalg.solve_triangular(torch.linalg.cholesky(h), identity, upper=False)
        check_error(block, by_torch, truth)
    room[:, 1 : width + 1, 2 : width + 2] = 7
    assert (room == 7).all()


@needs_compiler
@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_failure_on_the_host_stays_its_own(bad, leaf_host):
    a = torch.eye(40).repeat(3, 1, 1) * 4
    a[1, 30, 30] = bad
    failed = torch.zeros(3, dtype=torch.bool)
    _inverse_batched.inverse_factor_(a, failed, leaf_host, 16)
    assert failed.tolist() == [False, True, False]
    assert torch.equal(a[0], torch.eye(40) / 2) and torch.equal(a[2], torch.eye(40) / 2)
    assert torch.isfinite(a).all()


@needs_compiler
def test_the_leaf_is_as_wide_as_shared_memory_allows(library):
    library.factor_width_host.restype = ctypes.c_int64
    kib = {"sm_86": 99, "sm_80": 163, "sm_90": 227, "small": 48}
    widths = {
        chip: [library.factor_width_host(*map(ctypes.c_int64, (size, 1024 * k))) for size in (4, 8)]
        for chip, k in kib.items()
    }
    assert widths == {
        "sm_86": [128, 64],
        "sm_80": [128, 128],
        "sm_90": [128, 128],
        "small": [64, 64],
    }


@pytest.fixture(params=["torch", "host"])
def leaf(request, monkeypatch):
    """Use torch's leaf, or narrow ones of the CUDA kernel."""
    if request.param == "host":
        here = request.getfixturevalue("leaf_host")
        monkeypatch.setattr(_inverse_batched, "leaf_for", lambda h: (here, 32))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch, n", [(1, 1), (3, 2), (2, 129), (1, 700)])
def test_inverse(batch, n, dtype, leaf, make_layer, check_error):
    h = make_layer(batch, 1, n, dtype)[1]
    before = h.clone()
    inverse, used = inverse_batched(h, 0.01, 10.0)
    assert torch.equal(h, before) and torch.equal(inverse, inverse.mT)
    assert used.tolist() == [0.01] * batch and used.dtype == torch.float64
    truth = torch.stack([cholesky_inverse_ref(a, 0.01) for a in h])
    damped = torch.stack([damped_ref(a, 0.01) for a in h]).to(dtype)
    check_error(inverse, torch.cholesky_inverse(torch.linalg.cholesky(damped)), truth)


@needs_compiler
def test_ladder(leaf, make_layer):
    h = make_layer(4, 1, 80)[1]
    for entry, share in ((1, 0.05), (3, 2000.0)):  # needs a damping above the share
        values, vectors = torch.linalg.eigh(h[entry])
        values[0] = 0
        mean = values.sum() / (80 + share)
        values[0] = -share * mean
        h[entry] = (vectors * values) @ vectors.mT
    inverse, used = inverse_batched(h, 0.01, 10.0)
    assert used.tolist() == pytest.approx([0.01, 0.1, 0.01, float("inf")])
    for i in range(3):
        expected = cholesky_inverse_ref(h[i], float(used[i]))
        torch.testing.assert_close(inverse[i], expected, rtol=1e-6, atol=1e-9)
    ones = torch.ones(1, 4, 4, dtype=torch.float64)
    result = inverse_batched(ones, 0.0, 10.0)[1]
    assert result.tolist() == pytest.approx([1e-8])


def test_unusable_matrices_are_reported_before_a_second_try(make_layer):
    for index, value, message in [
        ((1, 0, 2), float("inf"), "h must be finite, got NaN or infinity in batch entry 1"),
        ((1, 2, 0), float("nan"), "h must be finite, got NaN or infinity in batch entry 1"),
        ((1,), 0.0, r"h must be of positive mean diagonal, got \[0.0\] in batch entry 1"),
    ]:
        h = make_layer(3, 1, 5)[1]
        h[index] = value
        with pytest.raises(ValueError, match=message):
            inverse_batched(h, 0.01, 10.0)


def test_the_device_is_asked_once():
    """Count what waits for a device: copies to the CPU and what has a size to find out."""
    from torch.utils._python_dispatch import TorchDispatchMode

    waits = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("_to_copy", "item", "_local_scalar_dense"):
                waits.append(func)
            return func(*args, **(kwargs or {}))

    calls = []
    original = torch.Tensor.cpu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lambda t: calls.append(1) or original(t))
        with Count():
            inverse_batched(torch.eye(300).repeat(2, 1, 1), 0.01, 10.0)
    assert calls == [1]
    assert [w for w in waits if w.overloadpacket.__name__ != "_to_copy"] == []


@pytest.mark.gpu
def test_the_gpu_is_asked_once(make_layer):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    h = make_layer(3, 1, 300, torch.float32)[1].cuda()
    mk.cholesky_inverse(h)  # loads what loads lazily
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        mk.cholesky_inverse(h)
    copies = [e for e in profile.events() if "Memcpy DtoH" in e.name]
    assert len(copies) == 1, [e.name for e in copies]
