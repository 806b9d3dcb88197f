import pytest
import torch

import mosaic_kernels as mk
from mosaic_kernels import _elimination
from mosaic_kernels.ref import (
    cholesky_inverse_ref,
    compensate_ref,
    layer_error_ref,
    prune_columns_ref,
)

DAMPING = 0.01
# (batch, rows, columns, group size): odd widths, several panels, packing, groups of heads
CASES = [
    (1, 5, 7, 1),
    (1, 1, 1, 1),
    (3, 12, 150, 1),
    (2, 9, 90, 2),
    (1, 20, 81, 3),
    (2, 16, 96, 8),
    (1, 24, 160, 32),
    (1, 8, 96, 96),
]
PANELS = sorted({_elimination.panel_torch, _elimination.PANEL_CPU}, key=str)


@pytest.mark.parametrize("batch, m, n, group", CASES)
def test_float64_is_the_reference(device, batch, m, n, group, make_layer):
    weight, h = make_layer(batch, m, n)
    before = weight.clone(), h.clone()
    result = mk.prune_columns(weight.to(device), h.to(device), group_size=group, damping=DAMPING)
    assert torch.equal(weight, before[0]) and torch.equal(h, before[1])
    assert result.order.shape == result.losses.shape == (batch, n // group)
    assert result.losses.dtype == torch.float64
    for b in range(batch):
        order, losses, _ = prune_columns_ref(weight[b], h[b], group, n // group, DAMPING)
        assert torch.equal(result.order[b].cpu(), order)
        torch.testing.assert_close(result.losses[b].cpu(), losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch, m, n, group", [(2, 30, 192, 1), (1, 30, 192, 8)])
def test_reduced_precision_reaches_the_same_loss(device, dtype, batch, m, n, group, make_layer):
    # Near ties may be broken otherwise: choices are compared by the loss they reach.
    weight, h = make_layer(batch, m, n)
    weight = weight.to(dtype)
    count = n // group // 2
    args = dict(group_size=group, count=count, damping=DAMPING)
    result = mk.prune_columns(weight.to(device), h.float().to(device), **args)
    for b in range(batch):
        _, losses, _ = prune_columns_ref(weight[b], h[b].float(), group, count, DAMPING)
        assert float(result.losses[b].sum()) <= float(losses.sum()) * (1 + 1e-4)
        kept = result.kept(count, b)
        best = compensate_ref(weight[b], h[b].float(), kept, DAMPING)
        error = layer_error_ref(weight[b], best, h[b].float(), kept, DAMPING)
        assert float(result.losses[b].sum()) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("batch, m, n, group", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_sum_to_the_layer_error_at_every_level(batch, m, n, group, dtype, make_layer):
    weight, h = make_layer(batch, m, n, dtype)
    result = mk.prune_columns(weight, h, group_size=group, damping=DAMPING)
    for level in {0, 1, n // group // 2, n // group}:
        kept = result.kept(level, batch - 1)
        assert kept.numel() == n - level * group
        layer = weight[-1], h[-1]
        compensated = mk.compensate(*layer, kept, damping=float(result.damping[-1]))
        error = layer_error_ref(layer[0], compensated, layer[1], kept, DAMPING)
        total, energy = float(result.losses[-1, :level].sum()), float(result.losses[-1].sum())
        relative = 1e-4 if dtype == torch.float32 else 1e-9
        assert total == pytest.approx(error, rel=relative, abs=relative**2 * energy)


@pytest.mark.parametrize("group", [1, 2, 8])
def test_identities(group, make_layer):
    # 1: W ends at the least squares solution. 2: A restricted to R is (H_RR)^-1.
    (weight,), (h,) = make_layer(1, 6, 48)
    count = 48 // group // 3
    order, _, w = prune_columns_ref(weight, h, group, count, DAMPING)
    result = mk.prune_columns(weight, h, group_size=group, count=count, damping=DAMPING)
    assert torch.equal(result.order[0], order)
    kept = result.kept(count)
    torch.testing.assert_close(mk.compensate(weight, h, kept, damping=DAMPING), w[:, kept])
    inverse = cholesky_inverse_ref(h, DAMPING)
    state = _elimination.initial_state(weight[None], inverse[None], group)
    panel = _elimination.PANEL_CPU(state, count)
    _elimination.apply(state, panel)
    ridge = DAMPING * h.diagonal().mean() * torch.eye(48, dtype=h.dtype)
    expected = torch.linalg.inv((h + ridge)[kept][:, kept])
    torch.testing.assert_close(state.inverse[0][kept][:, kept].tril(), expected.tril())
    torch.testing.assert_close(state.gram[0][kept][:, kept].tril(), (w.T @ w)[kept][:, kept].tril())


@pytest.mark.parametrize("group", [1, 2, 3, 8, 32])
def test_a_level_of_the_trajectory_is_a_run_stopped_there(device, group, make_layer):
    weight, h = (t.to(device) for t in make_layer(2, 10, 192))
    whole = mk.prune_columns(weight, h, group_size=group)
    count = 192 // group // 3
    part = mk.prune_columns(weight, h, group_size=group, count=count)
    assert torch.equal(part.order, whole.order[:, :count])
    assert torch.equal(part.kept(count, 1), whole.kept(count, 1))


def test_count_zero_and_single_layer(device, make_layer):
    weight, h = (t.to(device) for t in make_layer(1, 4, 6))
    nothing = mk.prune_columns(weight[0], h[0], count=0)
    assert nothing.order.shape == (1, 0) and nothing.kept(0).tolist() == [0, 1, 2, 3, 4, 5]
    whole = mk.prune_columns(weight[0], h[0])
    assert torch.equal(whole.order, mk.prune_columns(weight, h).order)


@pytest.mark.parametrize("batch, m, n, group", CASES)
def test_both_panels_agree(batch, m, n, group, make_layer):
    weight, h = make_layer(batch, m, n)
    inverse = mk.cholesky_inverse(h)[0]
    (first, first_loss), *others = (
        _elimination.eliminate(weight, inverse.clone(), group, n // group, panel)
        for panel in PANELS
    )
    for order, losses in others:
        assert torch.equal(order, first)
        torch.testing.assert_close(losses, first_loss, rtol=1e-9, atol=0)


def test_two_threads_give_the_bits_of_one(make_layer, monkeypatch):
    monkeypatch.setattr(_elimination, "COLUMNS_PER_THREAD", 64)
    # One wide layer, or a batch of narrow ones: the compiled panel gives the same bits.
    for batch, n in [(1, 200), (4, 96)]:
        weight, h = make_layer(batch, 8, n, torch.float32)
        inverse = torch.eye(n) + 0.1 * h / h.abs().max()
        results = []
        for threads in (1, 2):
            state = _elimination.initial_state(weight, inverse, 4)
            torch.set_num_threads(threads)
            results.append(_elimination.PANEL_CPU(state, 16))
            torch.set_num_threads(1)
        for name in ("picked", "losses", "u", "v"):
            assert torch.equal(getattr(results[0], name), getattr(results[1], name))


@pytest.mark.parametrize("group", [1, 4])
def test_dead_columns_go_first_at_no_loss(device, group, make_layer):
    weight, h = make_layer(1, 6, 24)
    dead = torch.tensor([3, 8, 9, 10, 11, 20])
    h[:, dead] = h[:, :, dead] = 0
    result = mk.prune_columns(weight.to(device), h.to(device), group_size=group)
    first = {1: [3, 8, 9, 10, 11, 20], 4: [2]}[group]
    assert result.order[0, : len(first)].tolist() == first
    assert result.losses[0, : len(first)].tolist() == [0.0] * len(first)
    assert result.losses[0, len(first)] > 0


def test_ties_go_to_the_lowest_index(device):
    weight, h = torch.ones(2, 130, device=device), torch.eye(130, device=device)
    assert mk.prune_columns(weight, h).order.tolist() == [list(range(130))]
    result = mk.prune_columns(weight, h, group_size=13)
    assert result.order.tolist() == [list(range(10))]


def test_parameters_are_taken_as_they_are(make_layer):
    (weight,), (h,) = make_layer(1, 3, 6)
    parameter = torch.nn.Parameter(weight)
    result = mk.prune_columns(parameter, h, count=2)
    assert not result.losses.requires_grad
    assert not mk.compensate(parameter, h, result.kept(2)).requires_grad
    accumulator = torch.zeros(6, 6, dtype=torch.float64)
    mk.hessian_update_(accumulator, parameter)
    assert not accumulator.requires_grad and accumulator.any()


def test_damping_used_is_returned(make_layer):
    weight, h = make_layer(2, 3, 4)
    h[1] = 1.0
    result = mk.prune_columns(weight, h, damping=0.0)
    assert result.damping.tolist() == pytest.approx([0.0, 1e-8])


@pytest.mark.parametrize("panel", PANELS)
@pytest.mark.parametrize("group", [1, 2])
def test_breakdown_is_confined_and_reported(panel, group, make_layer):
    weight, h = make_layer(3, 4, 140)
    inverse = mk.cholesky_inverse(h)[0]
    good = _elimination.eliminate(weight, inverse.clone(), group, 140 // group, panel)
    inverse[1, 5, 5] = -1.0
    order, losses = _elimination.eliminate(weight, inverse.clone(), group, 140 // group, panel)
    assert torch.isnan(losses[1]).all() and not torch.isnan(losses[[0, 2]]).any()
    assert torch.equal(order[0], good[0][0]) and torch.equal(order[2], good[0][2])
    assert order[1].sort().values.tolist() == list(range(140 // group))


def test_breakdown_error_names_entry_and_cure(monkeypatch, make_layer):
    from mosaic_kernels import prune

    losses = torch.tensor([[0.1, 0.2], [0.1, float("nan")]])
    with pytest.raises(
        RuntimeError,
        match="breakdown in batch entry 1 at removal 1 in float32. Pass h in float64, or use more",
    ):
        prune.check_losses("prune_columns", losses, losses.dtype)


def test_compensate_of_no_column_and_of_all(device, make_layer):
    (weight,), (h,) = (t.to(device) for t in make_layer(1, 5, 8))
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert mk.compensate(weight, h, none).shape == (5, 0)
    every = torch.arange(8, device=device)
    torch.testing.assert_close(mk.compensate(weight, h, every), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_compensate(device, dtype, make_layer, check_error):
    (weight,), (h,) = make_layer(1, 40, 100)
    weight = weight.to(dtype)
    h = h.to(torch.float64 if dtype == torch.float64 else torch.float32)
    kept = torch.arange(0, 100, 3)
    result = mk.compensate(weight.to(device), h.to(device), kept.to(device), damping=0.05)
    damped = h + 0.05 * h.diagonal().mean() * torch.eye(100, dtype=h.dtype)
    right = weight.to(h.dtype) @ damped[:, kept]
    by_torch = torch.linalg.solve(damped[kept][:, kept], right, left=False).to(dtype)
    check_error(result, by_torch, compensate_ref(weight, h, kept, 0.05))


def test_errors(make_layer):
    weight, h = make_layer(2, 3, 4)
    bad, kept = weight.clone(), torch.tensor([0, 2])
    bad[1, 0, 0] = float("nan")
    infinite = h.clone()
    infinite[0, 1, 1] = float("inf")
    layer = weight[0], h[0]
    trajectory = mk.prune_columns(weight, h, count=2)
    for call, message in [
        (lambda: mk.prune_columns(bad, h), "weight must be finite, got NaN .* batch entry 1"),
        (lambda: mk.prune_columns(weight, infinite), "h must be finite, got NaN .* entry 0"),
        (lambda: mk.prune_columns(weight[0], h), "weight must be a tensor of 3 dimensions"),
        (lambda: mk.prune_columns(weight[:1], h), r"weight must be \(2, m, 4\) to match h"),
        (lambda: mk.prune_columns(weight[:, :, :3], h), r"weight must be \(2, m, 4\)"),
        (lambda: mk.prune_columns(weight, None), "h must be a torch tensor, got NoneType"),
        (
            lambda: mk.compensate(layer[0], infinite[0], kept),
            "compensate: h must be finite, got NaN",
        ),
        (lambda: mk.compensate(layer[0], 0 * layer[1], kept), "compensate: h must be of positive"),
        (
            lambda: mk.compensate(*layer, [0, 2]),
            "compensate: kept must be a torch tensor, got list",
        ),
        (lambda: mk.prune_columns(weight[:0], h[:0]), "h must be a batch of at least one matrix"),
        (lambda: mk.prune_columns(weight[:, :0], h), "weight must be of at least one row"),
        (lambda: mk.prune_columns(weight, h.half()), "h must be float32 or float64"),
        (lambda: mk.prune_columns(weight.int(), h), "weight must be bfloat16, float16"),
        (lambda: mk.prune_columns(weight, h, group_size=3), "group_size must be a divisor of"),
        (lambda: mk.prune_columns(weight, h, group_size=0), "group_size must be a divisor of"),
        (lambda: mk.prune_columns(weight, h, count=5), "count must be between 0 and 4"),
        (lambda: mk.prune_columns(weight, h, count=-1), "count must be between 0 and 4"),
        (lambda: mk.prune_columns(weight, h, damping=-1), "damping must be finite and at least 0"),
        (lambda: trajectory.kept(3), "Trajectory.kept: level must be between 0 and 2, got 3"),
        (lambda: trajectory.kept(1, 2), "Trajectory.kept: entry must be between 0 and 1, got 2"),
        (lambda: mk.compensate(*layer, kept.flip(0)), "kept must be sorted column indices"),
        (lambda: mk.compensate(*layer, kept * 2), "kept must be sorted column indices"),
        (lambda: mk.compensate(*layer, kept - 1), "kept must be sorted column indices"),
        (lambda: mk.compensate(*layer, kept.int()), "kept must be int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_compensate_without_a_factor():
    h = torch.tensor([[1.0, 2.0, 0.5], [2.0, 1.0, 0.5], [0.5, 0.5, 1.0]])
    with pytest.raises(RuntimeError, match="h must be positive definite on the kept columns"):
        mk.compensate(torch.ones(1, 3), h, torch.tensor([0, 1]), damping=0.0)


def test_opcheck(device, make_layer):
    weight, h = (t.to(device) for t in make_layer(2, 3, 6))
    ops = torch.ops.mosaic_kernels
    inverse = mk.cholesky_inverse(h)[0]
    order = torch.empty(2, 2, dtype=torch.int64, device=device)
    losses = inverse.new_empty(2, 2)
    torch.library.opcheck(ops.eliminate_.default, (weight, inverse, order, losses, 2))
    kept = torch.tensor([1, 4], device=device)
    torch.library.opcheck(ops.compensate.default, (weight[0], h[0], kept, 0.01))
