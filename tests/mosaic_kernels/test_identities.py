"""The identities of the method, to a multiple of eps times the condition of the damped H."""

import pytest
import torch

import mosaic_kernels as mk
from mosaic_kernels import _elimination
from mosaic_kernels.ref import compensate_ref, damped_ref, layer_error_ref

# Several panels, so that the first identity is that of updated matrices, and packing.
CASES = [(1, 20, 300, 1), (3, 9, 200, 1), (2, 12, 192, 2), (2, 16, 240, 8), (1, 16, 288, 72)]
TIMES = 0.5  # the multiple of eps * condition; the largest seen on a CPU was 0.023
DAMPING = 0.01


def panel_of(device):
    return _elimination.PANEL_CUDA if device == "cuda" else _elimination.PANEL_CPU


@pytest.mark.parametrize("batch, m, n, group", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identities(device, batch, m, n, group, dtype, make_layer):
    weight, h = (t.to(device) for t in make_layer(batch, m, n, dtype))
    count = n // group * 2 // 3
    result = mk.prune_columns(weight, h, group_size=group, count=count, damping=DAMPING)
    inverse = mk.cholesky_inverse(h, DAMPING)[0]
    state = _elimination.initial_state(weight, inverse, group)
    width = max(1, _elimination.PANEL_COLUMNS // group)
    for done in range(0, count, width):
        panel = panel_of(device)(state, min(width, count - done))
        _elimination.apply(state, panel)
    for b in range(batch):
        kept = result.kept(count, b)
        damped = damped_ref(h[b], DAMPING)
        r = kept.cpu()
        condition = float(torch.linalg.cond(damped))
        bound = TIMES * torch.finfo(dtype).eps * condition
        # 1: W_R is the least squares solution
        truth = compensate_ref(weight[b], h[b], kept, DAMPING)
        found = mk.compensate(weight[b], h[b], kept, damping=DAMPING).cpu().double()
        assert float((found - truth).norm() / truth.norm()) <= bound
        # 2: A restricted to R is (H_RR)^-1, in its lower triangle
        truth = torch.linalg.inv(damped[r][:, r]).tril()
        found = state.inverse[b].cpu().double()[r][:, r].tril()
        assert float((found - truth).norm() / truth.norm()) <= bound


@pytest.mark.parametrize("batch, m, n, group", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_sum_to_the_layer_error(device, batch, m, n, group, dtype, make_layer):
    weight, h = (t.to(device) for t in make_layer(batch, m, n, dtype))
    result = mk.prune_columns(weight, h, group_size=group, damping=DAMPING)
    for level in (1, n // group // 2, n // group - 1):
        for b in range(batch):
            kept = result.kept(level, b)
            fitted = mk.compensate(weight[b], h[b], kept, damping=float(result.damping[b]))
            error = layer_error_ref(weight[b], fitted, h[b], kept, DAMPING)
            condition = float(torch.linalg.cond(damped_ref(h[b], DAMPING)))
            bound = TIMES * torch.finfo(dtype).eps * condition
            assert float(result.losses[b, :level].sum()) == pytest.approx(error, rel=bound)


def test_the_same_bits_twice(device, make_layer):
    weight, h = (t.to(device) for t in make_layer(2, 12, 200, torch.float32))
    first, second = (mk.prune_columns(weight, h, group_size=4) for _ in range(2))
    assert torch.equal(first.order, second.order) and torch.equal(first.losses, second.losses)
    kept = first.kept(30)
    fitted = [mk.compensate(weight[0], h[0], kept) for _ in range(2)]
    assert torch.equal(*fitted)
    assert torch.equal(mk.cholesky_inverse(h)[0], mk.cholesky_inverse(h)[0])
