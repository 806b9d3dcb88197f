import sys

import pytest
import torch

import mosaic_kernels as mk
from mosaic_kernels import _compensated, hessian
from mosaic_kernels.ref import hessian_ref

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(7, 5), (1, 1), (64, 33), (50, 130), (300, 513)]


def activations(tokens, n, dtype, device, padding=0, batch=()):
    generator = torch.Generator().manual_seed(tokens * 1000 + n)
    x = torch.randn(*batch, tokens, n + padding, generator=generator).to(device, dtype)
    return x[..., :n]


def sums(n, device="cpu", batch=(), compensated=True, dtype=torch.float32):
    """Return zeros for H, the sum of x and the residual."""
    h = torch.zeros(*batch, n, n, device=device, dtype=dtype)
    residual = h.new_zeros(*batch, 2, n) if compensated else None
    return h, h.new_zeros(*batch, n), residual


def add_by_torch(h, x, weight):
    """Add weight * X^T X as torch does it: on a GPU 16 bits go to the tensor cores there too."""
    if x.is_cuda and x.dtype.itemsize == 2:
        x = x.contiguous()
        h += weight * torch.mm(x.T, x, out_dtype=torch.float32)
    else:
        h.addmm_(x.float().T, x.float(), alpha=weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, n", SHAPES)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("compensated", [False, True])
def test_update_and_finalize(device, dtype, tokens, n, padding, compensated, check_error):
    h, sum_x, residual = sums(n, device, compensated=compensated)
    batches = [(activations(tokens + i, n, dtype, device, padding), 0.8 + 0.3 * i) for i in (0, 1)]
    by_torch = torch.zeros(n, n, device=device)
    for x, weight in batches:
        mk.hessian_update_(h, x, weight, sum_x, residual)
        add_by_torch(by_torch, x, weight)
    truth, truth_sum, total = hessian_ref(batches, n)
    check_error(h.tril(), by_torch.tril(), truth.tril())
    if not compensated:  # then the upper triangle is nobody's business
        h = torch.where(torch.ones_like(h).triu(1) > 0, float("nan"), h)
    mk.hessian_finalize_(h, total, sum_x, residual)
    assert torch.equal(h, h.T)
    check_error(h, by_torch / total, truth / total)
    check_error(sum_x, (sum(w * x.float().sum(0) for x, w in batches) / total), truth_sum / total)


def test_update_in_float64_is_exact_to_rounding(check_error):
    x = activations(90, 40, torch.float64, "cpu")
    h = torch.zeros(40, 40, dtype=torch.float64)
    mk.hessian_update_(h, x)
    check_error(h.tril(), (x.T @ x).tril(), hessian_ref([(x, 1.0)], 40)[0].tril())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("samples, tokens", [(1, 40), (5, 40), (40, 40), (3, 402), (9, 2304)])
@pytest.mark.parametrize("n", [9, 200])
@pytest.mark.parametrize("compensated", [False, True])
def test_weights_of_samples(device, dtype, samples, tokens, n, compensated, check_error):
    x = activations(tokens, n, dtype, device)
    weights = torch.rand(samples, generator=torch.Generator().manual_seed(0)) + 0.1
    h, sum_x, residual = sums(n, device, compensated=compensated)
    by_torch, torch_sum, _ = sums(n, device)
    for rows, weight in zip(x.chunk(samples), weights.tolist(), strict=True):
        add_by_torch(by_torch, rows, weight)
        torch_sum += weight * rows.float().sum(0)
    mk.hessian_update_(h, x, weights, sum_x, residual)
    truth, truth_sum, total = hessian_ref([(x, weights)], n)
    mk.hessian_finalize_(h, 1.0, sum_x, residual)
    check_error(h, by_torch, truth)
    check_error(sum_x, torch_sum, truth_sum)
    assert total == pytest.approx(float(weights.sum()) * tokens / samples)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_sample_of_weight_zero_is_not_read(device, kind):
    x = activations(60, 20, torch.bfloat16, device)
    x[20:40] = float("nan")
    h, sum_x, residual = sums(20, device)
    mk.hessian_update_(h, x, torch.tensor([1.0, 0.0, 1.0], dtype=kind), sum_x, residual)
    mk.hessian_finalize_(h, 40.0, sum_x, residual)
    kept = torch.cat([x[:20], x[40:]]).double()
    torch.testing.assert_close(h.double(), kept.T @ kept / 40)
    torch.testing.assert_close(sum_x.double(), kept.mean(0))


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("weight", [0.5, torch.tensor([0.25, 1.0, 0.5])])
def test_layers_of_a_batch_are_as_one_by_one(device, compensated, weight):
    x = activations(90, 70, torch.float16, device, padding=2, batch=(3,))
    together = sums(70, device, (3,), compensated)
    for _ in range(2):
        mk.hessian_update_(together[0], x, weight, *together[1:])
    mk.hessian_finalize_(together[0], 2.0, *together[1:])
    for entry in range(3):
        h, sum_x, residual = sums(70, device, (), compensated)
        for _ in range(2):
            mk.hessian_update_(h, x[entry], weight, sum_x, residual)
        mk.hessian_finalize_(h, 2.0, sum_x, residual)
        torch.testing.assert_close(together[0][entry], h, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(together[1][entry], sum_x, rtol=1e-6, atol=1e-5)


TOKENS = 1221 * 8192  # 10,002,432


def ten_million(device, dtype):
    """Return updates of ones but for one large first token, and H and the sum of x, exactly.

    The large entries are 2^19 twice, and 2^38 for the sum; an update adds 8192, which is half of
    what float32 can tell apart next to 2^38: rounded away each time, all ten million of them.
    """
    ones = torch.ones(8192, 3, device=device, dtype=dtype)
    first = torch.zeros(1, 3, device=device, dtype=dtype)
    first[0] = torch.tensor([2.0**19, -(2.0**19), 2.0**38])
    large = [2**19, -(2**19), 2**38]
    truth = torch.tensor([[float(a * b + TOKENS) for b in large] for a in large])
    return first, ones, truth, torch.tensor([float(a + TOKENS) for a in large])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ten_million_tokens_lose_nothing(device, dtype):
    first, ones, truth, truth_sum = ten_million(device, dtype)
    plain, plain_sum, _ = sums(3, device)
    kept, kept_sum, residual = sums(3, device)
    by_torch = torch.zeros(3, 3, device=device)
    for x in (first, *(ones for _ in range(TOKENS // 8192))):
        mk.hessian_update_(plain, x, 1.0, plain_sum)
        mk.hessian_update_(kept, x, 1.0, kept_sum, residual)
        by_torch.addmm_(x.float().T, x.float())
    mk.hessian_finalize_(plain, 1.0, plain_sum)
    mk.hessian_finalize_(kept, 1.0, kept_sum, residual)
    # 305 units in the last place are lost by plain sums, here and in torch; none with errors.
    for lost in (plain.cpu(), by_torch.cpu()):
        assert truth[0, 0] - lost[0, 0] == 1e7 // 2**15 * 2**15 and lost[0, 0] == 2.0**38
        assert lost[1, 0] == -(2.0**38)
    assert plain_sum[2] == 2.0**38
    assert torch.equal(kept.cpu(), truth)
    assert torch.equal(kept_sum.cpu(), truth_sum)


def test_one_update_of_ten_million_tokens_loses_nothing(device):
    """Inside an update at most 8192 tokens are summed plainly: those beside the large one."""
    first, ones, truth, truth_sum = ten_million(device, torch.bfloat16)
    x = ones.repeat(TOKENS // 8192, 1)
    x[0] = first[0].abs() + 1  # all positive: tensor cores cut off towards zero, not to nearest
    h, sum_x, residual = sums(3, device)
    mk.hessian_update_(h, x, 1.0, sum_x, residual)
    mk.hessian_finalize_(h, 1.0, sum_x, residual)
    unit = 2.0**15
    assert (h[:2, :2].cpu() - truth[0, 0]).abs().max() <= unit
    assert (sum_x.cpu() - truth_sum)[[0, 2]].abs().max() <= unit
    assert truth[0, 0] - 2.0**38 > 300 * unit


def test_update_repeats_bit_by_bit(device):
    x = activations(3000, 300, torch.bfloat16, device)
    weights = torch.rand(10)
    results = []
    for _ in range(2):
        h, sum_x, residual = sums(300, device)
        for weight in (0.7, weights, 1.3):
            mk.hessian_update_(h, x, weight, sum_x, residual)
        results.append((h, sum_x, residual))
    assert all(map(torch.equal, *results))


def test_transposed_input_is_accepted(device, check_error):
    x = activations(6, 20, torch.float32, device).T  # strides (1, 20)
    h = torch.zeros(6, 6, device=device)
    mk.hessian_update_(h, x)
    check_error(h.tril(), (x.T @ x).tril(), hessian_ref([(x, 1.0)], 6)[0].tril())


@pytest.mark.parametrize("tokens, weight", [(1, 0.0), (4, 0.0), (4, torch.zeros(2))])
def test_nothing_to_add_changes_nothing(device, tokens, weight):
    h, sum_x, residual = sums(3, device)
    x = torch.full((tokens, 3), float("nan"), device=device)
    mk.hessian_update_(h, x, weight, sum_x, residual)
    assert not h.any() and not sum_x.any() and not residual.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200, 1030])
@pytest.mark.parametrize("compensated", [False, True])
def test_both_mirrors_agree(dtype, n, compensated):
    generator = torch.Generator().manual_seed(n)
    lower = torch.randn(1, n, n, dtype=dtype, generator=generator)
    residual = torch.randn(1, 2, n, dtype=dtype, generator=generator) if compensated else None
    a, b = lower.clone(), lower.clone()
    _compensated.finalize_torch(a, 3.0, None, residual)
    _compensated.FINALIZE_CPU(b, 3.0, None, residual)
    expected = lower.tril()
    if residual is not None:
        expected = expected + lower.triu(1).mT + torch.diag_embed(residual[:, 0])
    assert torch.equal(a, b) and torch.equal(a.tril(), expected.tril() / 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200, 1030])
def test_both_compensated_sums_agree_and_lose_nothing(dtype, n):
    generator = torch.Generator().manual_seed(n)
    a, part = torch.randn(2, n, n, dtype=dtype, generator=generator)
    part *= 2.0 ** torch.randint(-30, 30, (n, n), generator=generator)
    a.tril_()
    b, before = a.clone(), a.clone()
    errors_a, errors_b = torch.zeros(2, n, dtype=dtype)
    for factor in (1.0, 0.3):
        _compensated.add_compensated_torch(a, part * factor, errors_a)
        _compensated.ADD_COMPENSATED_CPU(b, part * factor, errors_b)
    assert torch.equal(a, b) and torch.equal(errors_a, errors_b)
    if dtype == torch.float32:
        truth = before.double() + part.double() + (part * 0.3).double()
        kept = a.double().tril() + a.double().triu(1).T + errors_a.double().diag()
        torch.testing.assert_close(kept.tril(), truth.tril(), rtol=1e-13, atol=1e-13)


def test_update_errors():
    h, x = torch.zeros(3, 3), torch.ones(4, 3)
    two = torch.zeros(2, 3, 3)
    for arguments, message in [
        ((h, torch.ones(4, 2)), r"hessian_update_: x must be \(tokens, 3\) to match h"),
        ((h, torch.ones(0, 3)), "hessian_update_: x must be of at least one token"),
        ((two, torch.ones(3, 4, 3)), r"hessian_update_: x must be \(2, tokens, 3\) to match h"),
        ((h, torch.ones(2, 2, 3)), "hessian_update_: x must be a tensor of 2 dimensions"),
        ((two, x), "hessian_update_: x must be a tensor of 3 dimensions"),
        ((h, x.int()), "hessian_update_: x must be bfloat16, float16, float32 or float64"),
        ((h.half(), x), "hessian_update_: h must be float32 or float64"),
        ((torch.zeros(3, 4), x), "hessian_update_: h must be square"),
        ((torch.zeros(0, 0), x), "hessian_update_: h must be square, with at least one column"),
        ((torch.zeros(0, 3, 3), x), "hessian_update_: h must be a batch of at least one matrix"),
        ((torch.zeros(3, 6)[:, ::2], x), "h and sum_x must be contiguous"),
        ((h, x, 1.0, None, torch.zeros(3, 2).T), "h, sum_x and residual must be contiguous"),
        ((h, x.to("meta")), "hessian_update_: x must be on cpu like the other tensors"),
        ((h, x.numpy()), "hessian_update_: x must be a torch tensor, got ndarray"),
        ((h, x, [1.0, 2.0]), "hessian_update_: weight must be a number, or a tensor .* got list"),
        ((h, x, -1.0), "hessian_update_: weight must be finite and at least 0, got -1.0"),
        ((h, x, float("nan")), "hessian_update_: weight must be finite and at least 0, got nan"),
        ((h, x, torch.tensor([1.0, -1.0])), r"weight must be finite and at least 0, got \[-1.0\]"),
        ((h, x, torch.ones(3)), r"weight must be \(samples,\) with 4 tokens a multiple of samples"),
        ((h, x, torch.ones(0)), r"weight must be \(samples,\) with 4 tokens a multiple of samples"),
        ((h, x, torch.ones(2).half()), "hessian_update_: weight must be float32 or float64"),
        ((h, x, torch.tensor(1.0)), "hessian_update_: weight must be a tensor of 1 dimensions"),
        ((h, x, torch.ones(2, device="meta")), "weight must be a number or a tensor on the CPU"),
        ((h, x, 1.0, torch.zeros(4)), r"hessian_update_: sum_x must be \(3,\) to match h"),
        ((h, x, 1.0, torch.zeros(3).double()), "hessian_update_: sum_x must be float32"),
        ((h, x, 1.0, None, torch.zeros(3, 3)), r"residual must be \(2, 3\) to match h"),
        (
            (h, x, 1.0, None, torch.zeros(2, 3).double()),
            "hessian_update_: residual must be float32",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            mk.hessian_update_(*arguments)
    assert not h.any() and not two.any()


@pytest.mark.parametrize("total", [0.0, -1.0, float("nan"), float("inf")])
def test_finalize_without_samples(total):
    with pytest.raises(ValueError, match="total_weight must be finite and above 0.*saw no sample"):
        mk.hessian_finalize_(torch.eye(3), total)


@pytest.mark.parametrize("where", ["h", "sum_x", "residual"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_finalize_of_what_is_not_finite_writes_nothing(device, where, value):
    h, sum_x, residual = torch.eye(3, device=device).tril(), *sums(3, device)[1:]
    {"h": h.diagonal(), "sum_x": sum_x, "residual": residual[0]}[where][1] = value
    before = [tensor.clone() for tensor in (h, sum_x, residual)]
    label = r"diag\(h\)" if where == "h" else where
    count = 6 if where == "residual" else 3
    with pytest.raises(ValueError, match=f"{label} must be finite, got 1 values of {count} that"):
        mk.hessian_finalize_(h, 2.0, sum_x, residual)
    for tensor, old in zip((h, sum_x, residual), before, strict=True):
        assert torch.equal(tensor.nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_in_x_names_the_layer(device, value, dtype):
    h, sum_x, residual = sums(40, device, (3,))
    x = activations(50, 40, dtype, device, batch=(3,)).contiguous()
    mk.hessian_update_(h, x, 1.0, sum_x, residual)
    x[1, 7, 5] = value
    mk.hessian_update_(h, x, 1.0, sum_x, residual)
    message = r"diag\(h\) must be finite, got 1 values of 120 that are not \(entry 1\)"
    with pytest.raises(ValueError, match=message):
        mk.hessian_finalize_(h, 100.0, sum_x, residual)


def test_without_triton_the_error_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "mosaic_kernels._triton.hessian", None)
    with pytest.raises(RuntimeError, match="hessian_update_: .* needs triton.*pip install triton"):
        h = torch.zeros(1, 2, 2)
        hessian._update_cuda(h, torch.ones(1, 1, 2), 1.0, None, None, None)


def test_tuning_is_for_a_gpu():
    for arguments, message in [
        ((64, torch.bfloat16, 8, False, "cpu"), "tune_hessian: device must be a CUDA device"),
        ((64, torch.float64), "tune_hessian: dtype must be bfloat16, float16 or float32"),
        ((0, torch.float32), "tune_hessian: n must be at least 1, got 0"),
        ((64, torch.float32, 0), "tune_hessian: tokens must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            mk.tune_hessian(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tuning_times_each_candidate():
    times = mk.tune_hessian(512, torch.bfloat16, tokens=1024)
    assert len(times) >= 2 and all(time > 0 for time in times.values())


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0])])
@pytest.mark.parametrize("compensated", [False, True])
def test_opcheck(device, weights, compensated):
    x = torch.randn(2, 8, 5, device=device)
    h, sum_x, residual = sums(5, device, (2,), compensated)
    for total in (None, sum_x):
        update = torch.ops.mosaic_kernels.hessian_update_.default
        torch.library.opcheck(update, (h, x, 0.5, weights, total, residual))
        finalize = torch.ops.mosaic_kernels.hessian_finalize_.default
        torch.library.opcheck(finalize, (h, 2.0, total, residual))
