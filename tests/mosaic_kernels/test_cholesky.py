import pytest
import torch

import mosaic_kernels as mk
from mosaic_kernels import _inverse_batched, cholesky
from mosaic_kernels.ref import cholesky_inverse_ref, damped_ref

ATTEMPTS = sorted({_inverse_batched.invert_by_factors, cholesky.INVERT_CPU}, key=str)


def torch_inverse(h, damping):
    damped = torch.stack([damped_ref(a, damping) for a in h]).to(h)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch, n", [(1, 1), (3, 2), (2, 128), (1, 129), (2, 300), (1, 1100)])
def test_inverse(device, dtype, batch, n, make_layer, check_error):
    h = make_layer(batch, 1, n, dtype)[1].to(device)
    before = h.clone()
    inverse, used = mk.cholesky_inverse(h, 0.01)
    assert torch.equal(h, before)
    assert torch.equal(inverse, inverse.mT)
    assert used.tolist() == [0.01] * batch and used.dtype == torch.float64
    truth = torch.stack([cholesky_inverse_ref(a, 0.01) for a in h])
    check_error(inverse, torch_inverse(h, 0.01), truth)


def test_single_matrix(device, make_layer):
    h = make_layer(1, 1, 10)[1].to(device)
    inverse, used = mk.cholesky_inverse(h[0])
    assert inverse.shape == (10, 10) and used.shape == (1,)
    assert torch.equal(inverse, mk.cholesky_inverse(h)[0][0])


def factors_by_torch(a, failed):
    leaf = _inverse_batched.leaf_torch
    _inverse_batched.inverse_factor_(a, failed, leaf, _inverse_batched.LEAF)
    return a


@pytest.mark.parametrize("factors", [factors_by_torch, _inverse_batched.inverse_factors])
@pytest.mark.parametrize("n", [1, 127, 128, 300, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_factors(factors, n, dtype, make_layer, check_error):
    a = make_layer(2, 1, n, torch.float64)[1] + 0.1 * torch.eye(n, dtype=torch.float64)
    truth = torch.linalg.inv(torch.linalg.cholesky(a))
    a = a.to(dtype)
    failed = torch.zeros(2, dtype=torch.bool)
    found = factors(a.tril() + 7 * torch.ones_like(a).triu(1), failed)
    assert not failed.any() and not found.triu(1).any()
    if dtype == torch.float64:  # which is all the truth there is
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
    else:
        eye = torch.eye(n).expand_as(a)
        by_torch = torch.linalg.solve_triangular(torch.linalg.cholesky(a), eye, upper=False)
        check_error(found, by_torch, truth)


@pytest.mark.parametrize("factors", [factors_by_torch, _inverse_batched.inverse_factors])
def test_a_failed_factor_stays_its_own(factors):
    a = torch.eye(140).repeat(3, 1, 1) * 4
    a[1, 30, 30] = -1
    failed = torch.zeros(3, dtype=torch.bool)
    found = factors(a, failed)
    assert failed.tolist() == [False, True, False]
    assert torch.equal(found[0], torch.eye(140) / 2) and torch.equal(found[2], found[0])
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("attempt", ATTEMPTS)
@pytest.mark.parametrize("n", [1, 127, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_inverses(attempt, n, dtype, make_layer, check_error):
    a = make_layer(3, 1, n, dtype)[1]
    a += 0.1 * torch.eye(n, dtype=dtype)
    failed = torch.zeros(3, dtype=torch.bool)
    inverse = attempt(a.tril() + 7 * torch.ones_like(a).triu(1), failed)
    assert not failed.any() and torch.equal(inverse, inverse.mT)
    by_torch = torch.stack([torch.cholesky_inverse(torch.linalg.cholesky(m)) for m in a])
    truth = torch.stack([torch.linalg.inv(m.double()) for m in a])
    check_error(inverse, by_torch, truth)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_failure_stays_its_own(attempt):
    a = torch.eye(300).repeat(3, 1, 1) * 4
    a[1, 200, 200] = -1
    failed = torch.zeros(3, dtype=torch.bool)
    inverse = attempt(a, failed)
    assert failed.tolist() == [False, True, False]
    assert torch.equal(inverse[0], torch.eye(300) / 4) and torch.equal(inverse[2], inverse[0])


def test_damping_is_raised_for_the_failing_matrix_alone(device, make_layer):
    h = make_layer(3, 1, 80)[1].to(device)
    values, vectors = torch.linalg.eigh(h[1])
    values[0] = -0.05 * h[1].diagonal().mean()  # needs a damping above 0.05
    h[1] = (vectors * values) @ vectors.mT
    inverse, used = mk.cholesky_inverse(h, 0.01)
    assert used.tolist() == pytest.approx([0.01, 0.1, 0.01])
    for i in range(3):
        torch.testing.assert_close(inverse[i].cpu(), cholesky_inverse_ref(h[i], float(used[i])))


def test_ladder_of_damping_zero_starts_at_1e_8(device):
    h = torch.ones(1, 4, 4, dtype=torch.float64, device=device)  # of rank 1
    used = mk.cholesky_inverse(h, 0.0)[1]
    assert used.tolist() == pytest.approx([1e-8])
    full = torch.eye(4, dtype=torch.float64, device=device)
    assert mk.cholesky_inverse(full, 0.0)[1].tolist() == [0.0]


def test_past_the_limit_the_error_names_the_entries(device):
    h = torch.eye(3, device=device).repeat(4, 1, 1)
    h[1, 0, 0] = h[3, 0, 0] = -1.9  # mean diag 0.033: a damping of 10 adds 0.33
    with pytest.raises(
        RuntimeError,
        match="no Cholesky factor for batch entries 1, 3 with damping up to 10.0",
    ):
        mk.cholesky_inverse(h)


def test_errors():
    eye = torch.eye(3).repeat(3, 1, 1)
    zero, bad = eye.clone(), eye.clone()
    zero[2] = 0
    bad[0, 0, 1] = float("inf")
    for arguments, message in [
        ((zero,), r"h must be of positive mean diagonal, got \[0.0\] in batch entry 2"),
        ((bad,), "h must be finite, got NaN or infinity in batch entry 0"),
        ((eye.half(),), "cholesky_inverse: h must be float32 or float64"),
        ((eye[:, :2],), "cholesky_inverse: h must be square"),
        ((eye[:0],), "cholesky_inverse: h must be a batch of at least one matrix"),
        ((eye[0, 0],), "cholesky_inverse: h must be a tensor of 2 or 3 dimensions"),
        ((eye, -0.1), "damping must be finite and at least 0, got -0.1"),
        ((eye, 1.0, 0.5), r"max_damping must be finite and at least damping \(1.0\), got 0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            mk.cholesky_inverse(*arguments)


def test_opcheck(device, make_layer):
    h = make_layer(2, 1, 6)[1].to(device)
    torch.library.opcheck(torch.ops.mosaic_kernels.cholesky_inverse.default, (h, 0.01, 10.0, 0))
