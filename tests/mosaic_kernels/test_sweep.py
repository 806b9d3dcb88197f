import pytest
import torch

import mosaic_kernels as mk
from benchmarks.baselines_sweep import sparsegpt_torch
from mosaic_kernels import _walk, sweep
from mosaic_kernels._extension import EXTENSION
from mosaic_kernels.ref import damped_ref, inverse_upper_factor_ref, prune_weights_ref

DAMPING = 0.01
# (batch, rows, columns, sparsity or pattern, block size): odd shapes, several blocks, blocks that
# end short, groups wider than a vector's columns and than a block
CASES = [
    (1, 1, 1, 0.5, 128),
    (2, 5, 7, 0.4, 3),
    (3, 18, 150, 0.5, 128),
    (2, 33, 70, 0.13, 16),
    (1, 4, 40, 0.0, 128),
    (1, 3, 20, 0.99, 7),
    (1, 7, 2, (1, 2), 128),
    (2, 17, 148, (2, 4), 128),
    (1, 9, 96, (4, 8), 20),
    (1, 6, 45, (1, 3), 16),
    (2, 4, 60, (11, 20), 40),
    (1, 5, 64, (3, 32), 8),
]
STEPS = [_walk.STEPS_TORCH] if _walk.STEPS_CPU is _walk.STEPS_TORCH else [
    _walk.STEPS_TORCH,
    _walk.STEPS_CPU,
]  # fmt: skip


def target_of(target):
    return {"pattern" if isinstance(target, tuple) else "sparsity": target}


def layer_error(weight, result, h, damping=DAMPING, entry=0):
    """Return ||(W - W') L||_F^2 for the damped H = L L^T, in float64."""
    difference = weight[entry].cpu().double() - result.weight[entry].cpu().double()
    return float(torch.trace(difference @ damped_ref(h[entry], damping) @ difference.T))


@pytest.fixture(params=STEPS, ids=lambda steps: steps.walk.__name__)
def steps(request, monkeypatch):
    """Run a test with each implementation for the CPU."""
    monkeypatch.setattr(_walk, "STEPS_CPU", request.param)


@pytest.mark.parametrize("batch, m, n, target, block_size", CASES)
def test_float64_is_the_reference(device, batch, m, n, target, block_size, steps, make_layer):
    weight, h = make_layer(batch, m, n)
    before = weight.clone(), h.clone()
    args = dict(damping=DAMPING, block_size=block_size, **target_of(target))
    result = mk.prune_weights(weight.to(device), h.to(device), **args)
    assert torch.equal(weight, before[0]) and torch.equal(h, before[1])
    assert result.weight.shape == result.mask.shape == (batch, m, n)
    assert result.mask.dtype == torch.bool and result.damping.tolist() == [DAMPING] * batch
    assert result.losses.shape == (batch,) and result.losses.dtype == torch.float64
    pair = target_of(target)
    for b in range(batch):
        w, mask, loss = prune_weights_ref(
            weight[b], h[b], pair.get("sparsity"), pair.get("pattern"), DAMPING, block_size
        )
        assert torch.equal(result.mask[b].cpu(), mask)
        torch.testing.assert_close(result.weight[b].cpu(), w, rtol=1e-8, atol=1e-10)
        assert float(result.losses[b]) == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("batch, m, n, target, block_size", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_is_the_layer_error(device, batch, m, n, target, block_size, dtype, steps, make_layer):
    weight, h = make_layer(batch, m, n, dtype)
    args = dict(block_size=block_size, **target_of(target))
    result = mk.prune_weights(weight.to(device), h.to(device), **args)
    for b in range(batch):
        error = layer_error(weight, result, h, entry=b)
        relative = 1e-4 if dtype == torch.float32 else 1e-9
        assert float(result.losses[b]) == pytest.approx(error, rel=relative, abs=relative**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [0.5, (2, 4)])
def test_reduced_precision_reaches_the_same_loss(device, dtype, target, steps, make_layer):
    # Near ties may be broken otherwise: choices are compared by the loss they reach.
    weight, h = make_layer(2, 30, 192)
    weight, h = weight.to(dtype), h.float()
    result = mk.prune_weights(weight.to(device), h.to(device), **target_of(target))
    assert result.weight.dtype == dtype
    pair = target_of(target)
    for b in range(2):
        w, _, loss = prune_weights_ref(
            weight[b], h[b], pair.get("sparsity"), pair.get("pattern"), DAMPING, 128
        )
        assert float(result.losses[b]) == pytest.approx(loss, rel=1e-3)
        # Rounding to the narrow type is all that the weights may have lost on top.
        error = layer_error(weight, result, h, entry=b)
        assert error <= loss * (1 + 1e-3) + 100 * torch.finfo(dtype).eps ** 2 * float(w.norm()) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch, n", [(1, 1), (2, 130), (1, 300)])
def test_factor(device, dtype, batch, n, make_layer, check_error):
    h = make_layer(batch, 1, n, dtype)[1]
    factor, used = sweep._factor_op(h.to(device), DAMPING, 10.0)
    assert used.tolist() == [DAMPING] * batch
    assert torch.equal(factor, factor.triu())
    truth = torch.stack([inverse_upper_factor_ref(a, DAMPING) for a in h])
    damped = torch.stack([damped_ref(a, DAMPING) for a in h]).to(h)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    check_error(factor, torch.linalg.cholesky(inverse, upper=True), truth)


@pytest.mark.parametrize("share", [0.0, 0.001, 1 / 3, 0.5, 0.777, 0.999])
@pytest.mark.parametrize("m, n, block_size", [(7, 300, 128), (33, 50, 16), (1, 9, 2)])
def test_sparsity_is_exact_and_pruned_weights_are_zero(device, share, m, n, block_size, make_layer):
    weight, h = make_layer(2, m, n, torch.float32)
    result = mk.prune_weights(
        weight.to(device), h.to(device), sparsity=share, block_size=block_size
    )
    for b in range(2):
        assert int((~result.mask[b]).sum()) == round(share * m * n)
    assert not result.weight[~result.mask].any()
    assert result.weight[result.mask].all()


@pytest.mark.parametrize("keep, of", [(2, 4), (4, 8), (1, 2), (3, 4), (1, 5), (7, 24), (100, 120)])
def test_pattern_holds_in_every_group(device, keep, of, make_layer):
    weight, h = make_layer(2, 19, 240, torch.float32)
    result = mk.prune_weights(weight.to(device), h.to(device), pattern=(keep, of))
    assert bool((result.mask.unflatten(-1, (-1, of)).sum(-1) == keep).all())
    assert not result.weight[~result.mask].any()


@pytest.mark.parametrize("target", [0.5, (2, 4)])
def test_far_below_masks_without_compensation(device, target):
    # 256 channels that share 32 factors, as those of a trained layer do.
    generator = torch.Generator().manual_seed(0)
    factors, loadings, noise, weight = (
        torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        for shape in ((1024, 32), (32, 256), (1024, 256), (64, 256))
    )
    x = factors @ loadings + 0.3 * noise
    h = x.mT @ x / 1024
    result = mk.prune_weights(weight.to(device), h.to(device), **target_of(target))
    scores = {"magnitude": weight.abs(), "wanda": weight.abs() * h.diagonal(dim1=1, dim2=2).sqrt()}
    for name, score in scores.items():
        groups = score.unflatten(-1, (-1, 4 if target != 0.5 else 256))
        lost = groups.argsort(-1)[..., : groups.shape[-1] // 2]
        masked = weight * torch.ones_like(groups).scatter_(-1, lost, 0).flatten(-2)
        assert int((masked == 0).sum()) == int((~result.mask).sum())
        plain = sweep.Sweep(masked, result.mask, result.losses, result.damping)
        assert float(result.losses) < 0.2 * layer_error(weight, plain, h), name


@pytest.mark.parametrize("target", [0.5, (2, 4)])
def test_the_published_loop_ends_alike(target, steps, make_layer):
    (weight,), (h,) = make_layer(1, 24, 256)
    result = mk.prune_weights(weight, h, **target_of(target))
    w, mask, loss = sparsegpt_torch(weight, h, **target_of(target))
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight, w, rtol=1e-8, atol=1e-10)
    assert float(result.losses) == pytest.approx(loss, rel=1e-9)


def test_dead_columns_count_first(device, steps, make_layer):
    weight, h = make_layer(2, 6, 24)
    dead = torch.tensor([3, 8, 9, 10, 11, 20])
    h[0, dead] = h[0, :, dead] = 0  # a quarter of the first layer alone
    for share, zeros in [(0.5, 72), (0.25, 36), (0.1, 36)]:
        result = mk.prune_weights(weight.to(device), h.to(device), sparsity=share, block_size=8)
        assert not result.mask[0][:, dead].any() and not result.weight[0][:, dead].any()
        assert int((~result.mask[0]).sum()) == zeros
        assert int((~result.mask[1]).sum()) == round(share * 144)
        w, mask, loss = prune_weights_ref(weight[0], h[0], share, None, DAMPING, 8)
        assert torch.equal(result.mask[0].cpu(), mask)
        assert float(result.losses[0]) == pytest.approx(loss, rel=1e-9)
    assert float(result.losses[0]) == 0.0
    result = mk.prune_weights(weight.to(device), h.to(device), pattern=(2, 4))
    groups = result.mask[0].unflatten(-1, (-1, 4))
    assert bool((groups.sum(-1) == 2).all())
    assert groups[:, 2].tolist() == [[False, False, True, True]] * 6  # dead as a whole
    assert not result.mask[0][:, [3, 20]].any() and not result.weight[0][:, dead].any()


def test_ties_go_to_the_lowest_row_then_column(device, steps):
    weight, h = torch.ones(3, 150, device=device), torch.eye(150, device=device)
    result = mk.prune_weights(weight, h, sparsity=0.5, block_size=50)
    block = [0] * 75 + [1] * 75
    for begin in (0, 50, 100):
        assert result.mask[:, begin : begin + 50].int().flatten().tolist() == block
    result = mk.prune_weights(weight, h, pattern=(2, 5))
    assert result.mask.int().tolist() == [[0, 0, 0, 1, 1] * 30] * 3


def test_zero_and_huge_weights(device, steps):
    # Squares of the huge ones overflow, those of the tiny ones vanish; the order does not.
    weight = torch.tensor([[0.0, 1e30, -1e-30, 1.0, -2e30, -0.0, 2e-30, 3e30]], device=device)
    result = mk.prune_weights(weight, torch.eye(8, device=device), sparsity=0.5)
    assert result.mask.int().tolist() == [[0, 1, 0, 1, 1, 0, 0, 1]]
    assert torch.equal(result.weight, weight.masked_fill(~result.mask, 0))


@pytest.mark.parametrize("target", [0.5, (2, 4)])
def test_same_bits_twice_and_on_two_threads(device, target, make_layer, monkeypatch):
    monkeypatch.setattr(_walk, "ROWS_PER_THREAD", 16)
    for batch in (1, 3):
        weight, h = (t.to(device) for t in make_layer(batch, 40, 256, torch.float32))
        first = mk.prune_weights(weight, h, **target_of(target))
        again = mk.prune_weights(weight, h, **target_of(target))
        assert torch.equal(first.weight, again.weight) and torch.equal(first.losses, again.losses)
    states = []
    for threads in (1, 2):
        state = _walk.State(
            weight.cpu().clone(),
            torch.eye(256).repeat(3, 1, 1) + 0.1 * h.cpu().triu(1),
            torch.ones(3, 40, 256, dtype=torch.bool),
            torch.zeros(3, 256, 40),
            torch.zeros(3, 40, dtype=torch.float64),
            torch.zeros(3, 256, dtype=torch.bool),
            *((0, 0) if target == 0.5 else target),
        )
        torch.set_num_threads(threads)
        if target == 0.5:
            _walk.STEPS_CPU.choose(state, 0, 128, torch.tensor([100, 200, 5120]))
        _walk.STEPS_CPU.walk(state, 0, 128)
        torch.set_num_threads(1)
        states.append(state)
    for name in ("weight", "mask", "errors", "losses"):
        assert torch.equal(getattr(states[0], name), getattr(states[1], name))


def test_single_layer_strides_and_parameters(device, make_layer):
    weight, h = (t.to(device) for t in make_layer(1, 5, 12))
    whole = mk.prune_weights(weight, h, sparsity=0.5)
    wide = torch.nn.Parameter(weight[0].T.contiguous().T)
    single = mk.prune_weights(wide, h[0].T.contiguous().T, sparsity=0.5)
    assert single.weight.shape == single.mask.shape == (5, 12)
    assert single.losses.shape == single.damping.shape == (1,)
    assert torch.equal(single.weight, whole.weight[0]) and not single.weight.requires_grad


def test_damping_is_raised_for_the_failing_matrix_alone(device, make_layer):
    weight, h = make_layer(3, 4, 80)
    values, vectors = torch.linalg.eigh(h[1])
    values[0] = -0.05 * h[1].diagonal().mean()  # needs a damping above 0.05
    h[1] = (vectors * values) @ vectors.mT
    result = mk.prune_weights(weight.to(device), h.to(device), sparsity=0.5)
    assert result.damping.tolist() == pytest.approx([0.01, 0.1, 0.01])
    for b, used in enumerate(result.damping.tolist()):
        error = layer_error(weight, result, h, used, b)
        assert float(result.losses[b]) == pytest.approx(error, rel=1e-9)


def test_runtime_errors(device):
    weight, h = torch.ones(4, 2, 3, device=device), torch.eye(3, device=device).repeat(4, 1, 1)
    h[1, 0, 0] = h[3, 0, 0] = -1.9
    with pytest.raises(
        RuntimeError, match="prune_weights: h .* batch entries 1, 3 with .* 10.0. .* symmetric.$"
    ):
        mk.prune_weights(weight, h, sparsity=0.5)
    # The second column takes over what the first carried: more than float16 holds.
    h = torch.tensor([[1.0, 0.99], [0.99, 1.0]], device=device)
    weight = torch.tensor([[4e4, 6e4]], device=device, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="finite, got NaN or infinity in .* entry 0 in float16"):
        mk.prune_weights(weight, h, pattern=(1, 2))
    with pytest.raises(RuntimeError, match="their loss must be finite, .* entry 0 in float32"):
        mk.prune_weights(torch.full((1, 2), 1e30, device=device), h, pattern=(1, 2))


def test_errors(make_layer):
    weight, h = make_layer(2, 3, 4)
    bad, infinite, zero = weight.clone(), h.clone(), h.clone()
    bad[1, 0, 0] = float("nan")
    infinite[0, 1, 1] = float("inf")
    zero[1] = 0

    def prune(weight=weight, h=h, **kwargs):
        return lambda: mk.prune_weights(weight, h, **(kwargs or {"sparsity": 0.5}))

    for call, message in [
        (prune(bad), "weight must be finite, got NaN .* batch entry 1"),
        (prune(h=infinite), "prune_weights: h must be finite, got NaN .* entry 0"),
        (prune(h=zero), r"h must be of positive mean diagonal, got \[0.0\] in batch entry 1"),
        (prune(weight[0]), "weight must be a tensor of 3 dimensions"),
        (prune(weight[:1]), r"weight must be \(2, m, 4\) to match h"),
        (prune(weight[:, :0]), "weight must be of at least one row"),
        (prune(weight[:0], h[:0]), "h must be a batch of at least one matrix"),
        (prune(weight.int()), "weight must be bfloat16, float16"),
        (prune(h=h.half()), "h must be float32 or float64"),
        (prune(h=h[:, :2]), "h must be square"),
        (prune(sparsity=None), "sparsity must be given, or else pattern, and not both"),
        (prune(sparsity=0.5, pattern=(2, 4)), "not both, got sparsity 0.5 and pattern"),
        (prune(sparsity=1.0), "sparsity must be at least 0 and below 1, got 1.0"),
        (prune(sparsity=-0.1), "sparsity must be at least 0 and below 1, got -0.1"),
        (prune(sparsity=float("nan")), "sparsity must be at least 0 and below 1, got nan"),
        (prune(pattern=(4, 4)), r"pattern must be \(keep, of\) with 1 <= keep < of, got"),
        (prune(pattern=(0, 4)), r"pattern must be \(keep, of\) with 1 <= keep < of, got"),
        (prune(pattern=(2, 4, 8)), r"pattern must be \(keep, of\)"),
        (prune(pattern=(1.0, 2)), r"pattern must be \(keep, of\)"),
        (prune(pattern="2:4"), r"pattern must be \(keep, of\) .* got 2:4"),
        (prune(pattern=(2, 3)), "pattern must be of groups that divide the 4 columns"),
        (prune(sparsity=0.5, block_size=0), "block_size must be at least 1, got 0"),
        (prune(sparsity=0.5, damping=-1), "damping must be finite and at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_opcheck(device, make_layer):
    weight, h = (t.to(device) for t in make_layer(2, 3, 8))
    ops = torch.ops.mosaic_kernels
    torch.library.opcheck(ops.upper_inverse_factor.default, (h, 0.01, 10.0))
    factor, _ = ops.upper_inverse_factor(h, 0.01, 10.0)
    dead = torch.zeros(2, 8, dtype=torch.bool, device=device)
    counts = torch.tensor([[6, 5], [6, 7]], device=device)
    torch.library.opcheck(ops.prune_weights.default, (weight, factor, dead, counts, 0, 0, 4))
    torch.library.opcheck(ops.prune_weights.default, (weight, factor, dead, counts, 2, 4, 4))


@pytest.mark.skipif(EXTENSION.module is None, reason="needs the compiled extension")
def test_bindings_refuse_what_cannot_be():
    module = EXTENSION.module
    five = [torch.zeros(64, 8, dtype=torch.float64).data_ptr()] * 5
    for call, message in [
        (lambda: module.choose_weights(five, 0, [4, 8, 0, 8], 4, 1), "batch must be at least 1"),
        (lambda: module.choose_weights(five, 1, [0, 8, 0, 8], 4, 1), "m must be at least 1"),
        (lambda: module.choose_weights(five, 1, [4, 8, 8, 1], 4, 1), "begin must be a column"),
        (lambda: module.choose_weights(five, 1, [4, 8, 4, 5], 4, 1), "width must be between 1"),
        (lambda: module.choose_weights([0] * 5, 1, [4, 8, 0, 8], 4, 1), "factor must be a non-nu"),
        (lambda: module.sweep_block(five, 1, [4, 8, 0, 8], 0, 0, 2, 1), "element_bytes must be 4"),
        (lambda: module.sweep_block(five, 1, [4, 8, 0, 8], 0, 0, 4, 0), "threads must be at leas"),
        (lambda: module.sweep_block(five, 1, [4, 8, 0, 0], 0, 0, 4, 1), "width must be between 1"),
        (lambda: module.sweep_block(five, 1, [4, 8, 0, 8], 1, 3, 4, 1), "of must be 0 or a divis"),
        (lambda: module.sweep_block(five, 1, [4, 8, 0, 8], 4, 4, 4, 1), "keep must be between 1"),
        (lambda: module.sweep_block(five, 1, [4, 8, 0, 8], 1, 0, 4, 1), "keep must be between 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(not EXTENSION.has_cuda, reason="needs the CUDA kernels")
def test_cuda_binding_refuses_what_cannot_be():
    five = [torch.zeros(64, 8, dtype=torch.float64).data_ptr()] * 5
    with pytest.raises(ValueError, match="sweep_block_cuda: of must be 0 or a divisor of width"):
        EXTENSION.module.sweep_block_cuda(five, 1, [4, 8, 0, 8], 1, 3, 4, 0, 0)
