import sys

import pytest
import torch

import mosaic_kernels as mk
from mosaic_kernels import hessian
from mosaic_kernels.ref import hessian_ref

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(7, 5), (1, 1), (64, 33), (50, 130), (300, 513)]


def activations(tokens, n, dtype, device, padding=0):
    generator = torch.Generator().manual_seed(tokens * 1000 + n)
    x = torch.randn(tokens, n + padding, generator=generator).to(device, dtype)
    return x[:, :n]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, n", SHAPES)
@pytest.mark.parametrize("padding", [0, 3])
def test_update_and_finalize(device, dtype, tokens, n, padding, check_error):
    h = torch.zeros(n, n, device=device)
    sum_x = torch.zeros(n, device=device)
    batches = [(activations(tokens + i, n, dtype, device, padding), 0.8 + 0.3 * i) for i in (0, 1)]
    by_torch = torch.zeros(n, n, device=device)
    for x, weight in batches:
        mk.hessian_update_(h, x, weight, sum_x)
        by_torch += weight * (x.float().T @ x.float())
    truth, truth_sum, total = hessian_ref(batches, n)
    check_error(h.tril(), by_torch.tril(), truth.tril())
    h += torch.full_like(h, float("nan")).triu(1)  # the upper triangle is nobody's business
    h = torch.where(torch.ones_like(h).triu(1) > 0, float("nan"), h)
    mk.hessian_finalize_(h, total, sum_x)
    assert torch.equal(h, h.T)
    check_error(h, by_torch / total, truth / total)
    check_error(sum_x, (sum(w * x.float().sum(0) for x, w in batches) / total), truth_sum / total)


def test_update_in_float64_is_exact_to_rounding(check_error):
    x = activations(90, 40, torch.float64, "cpu")
    h = torch.zeros(40, 40, dtype=torch.float64)
    mk.hessian_update_(h, x)
    check_error(h.tril(), (x.T @ x).tril(), hessian_ref([(x, 1.0)], 40)[0].tril())


def test_update_of_many_tokens_is_upcast_in_parts(check_error, monkeypatch):
    monkeypatch.setattr(hessian, "UPCAST_TOKENS", 16)
    x = activations(50, 9, torch.bfloat16, "cpu")
    h, sum_x = torch.zeros(9, 9), torch.zeros(9)
    mk.hessian_update_(h, x, 2.0, sum_x)
    truth, truth_sum, _ = hessian_ref([(x, 2.0)], 9)
    check_error(h.tril(), (2 * x.float().T @ x.float()).tril(), truth.tril())
    check_error(sum_x, 2 * x.float().sum(0), truth_sum)


def test_update_repeats_bit_by_bit(device):
    x = activations(200, 70, torch.float32, device)
    first, second = torch.zeros(2, 70, 70, device=device).unbind(0)
    mk.hessian_update_(first, x, 0.7)
    mk.hessian_update_(second, x, 0.7)
    assert torch.equal(first.tril(), second.tril())


def test_transposed_input_is_accepted(device, check_error):
    x = activations(6, 20, torch.float32, device).T  # strides (1, 20)
    h = torch.zeros(6, 6, device=device)
    mk.hessian_update_(h, x)
    check_error(h.tril(), (x.T @ x).tril(), hessian_ref([(x, 1.0)], 6)[0].tril())


@pytest.mark.parametrize("tokens, weight", [(0, 1.0), (4, 0.0)])
def test_nothing_to_add_changes_nothing(device, tokens, weight):
    h, sum_x = torch.zeros(3, 3, device=device), torch.zeros(3, device=device)
    mk.hessian_update_(h, torch.ones(tokens, 3, device=device), weight, sum_x)
    assert not h.any() and not sum_x.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200, 1030])
def test_both_mirrors_agree(dtype, n):
    lower = torch.randn(n, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    a, b = lower.clone(), lower.clone()
    hessian.finalize_torch(a, 3.0, None)
    hessian.FINALIZE_CPU(b, 3.0, None)
    assert torch.equal(a, b) and torch.equal(a.tril(), (lower / 3.0).tril())


def test_update_errors():
    h, x = torch.zeros(3, 3), torch.ones(4, 3)
    for arguments, message in [
        ((h, torch.ones(4, 2)), r"hessian_update_: x must be \(tokens, 3\) to match h"),
        ((h, torch.ones(2, 2, 3)), "hessian_update_: x must be a tensor of 2 dimensions"),
        ((h, x.int()), "hessian_update_: x must be bfloat16, float16, float32 or float64"),
        ((h.half(), x), "hessian_update_: h must be float32 or float64"),
        ((torch.zeros(3, 4), x), "hessian_update_: h must be square"),
        ((torch.zeros(0, 0), x), "hessian_update_: h must be square, with at least one column"),
        ((torch.zeros(3, 6)[:, ::2], x), "h and sum_x must be contiguous"),
        ((h, x.to("meta")), "hessian_update_: x must be on cpu like the other tensors"),
        ((h, x, -1.0), "hessian_update_: weight must be finite and at least 0, got -1.0"),
        ((h, x, float("nan")), "hessian_update_: weight must be finite and at least 0, got nan"),
        ((h, x, 1.0, torch.zeros(4)), r"hessian_update_: sum_x must be \(3,\) to match h"),
        ((h, x, 1.0, torch.zeros(3).double()), "hessian_update_: sum_x must be float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            mk.hessian_update_(*arguments)


@pytest.mark.parametrize("total", [0.0, -1.0, float("nan"), float("inf")])
def test_finalize_without_samples(total):
    with pytest.raises(ValueError, match="total_weight must be finite and above 0.*saw no sample"):
        mk.hessian_finalize_(torch.eye(3), total)


@pytest.mark.parametrize("where", ["h", "sum_x"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_finalize_of_what_is_not_finite_writes_nothing(where, value):
    h, sum_x = torch.eye(3).tril(), torch.ones(3)
    (h.diagonal() if where == "h" else sum_x)[1] = value
    before = h.clone(), sum_x.clone()
    label = r"diag\(h\)" if where == "h" else "sum_x"
    with pytest.raises(ValueError, match=f"{label} must be finite, got 1 values of 3"):
        mk.hessian_finalize_(h, 2.0, sum_x)
    assert torch.equal(h.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(sum_x.nan_to_num(), before[1].nan_to_num())


def test_without_triton_the_error_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "mosaic_kernels._triton.hessian", None)
    with pytest.raises(RuntimeError, match="hessian_update_: .* needs triton.*pip install triton"):
        hessian._update_cuda(torch.zeros(2, 2), torch.ones(1, 2), 1.0, None)


def test_opcheck(device):
    h, x = torch.zeros(5, 5, device=device), torch.randn(8, 5, device=device)
    for sum_x in (None, torch.zeros(5, device=device)):
        update = torch.ops.mosaic_kernels.hessian_update_.default
        torch.library.opcheck(update, (h, x, 0.5, sum_x))
        finalize = torch.ops.mosaic_kernels.hessian_finalize_.default
        torch.library.opcheck(finalize, (h, 2.0, sum_x))
