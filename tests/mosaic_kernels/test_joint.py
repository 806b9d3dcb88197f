"""Columns that several readers lose together: one order, each reader's own losses."""

import random

import pytest
import torch

import mosaic_kernels as mk
from mosaic_kernels import _memory, joint
from mosaic_kernels.ref import (
    compensate_ref,
    fused_choice_ref,
    layer_error_ref,
    prune_columns_joint_ref,
)

DAMPING = 0.01
INF = float("inf")
# (batch, rows of each reader, columns, group size): several panels, packing, one group alone
CASES = [
    (1, (5, 7), 7, 1),
    (1, (1,), 1, 1),
    (2, (12, 5), 100, 1),
    (2, (9, 20, 3), 90, 2),
    (2, (16, 16), 96, 8),
    (1, (24, 40), 256, 32),
    (1, (30, 8), 288, 72),
    (1, (8, 9), 96, 96),
]


@pytest.fixture
def make_readers(make_layer):
    """Return a factory of (weights, hs), each reader with an H of its own."""

    def make(batch, rows, n, dtype=torch.float64):
        layers = [make_layer(batch, m, n, dtype, seed=r) for r, m in enumerate(rows)]
        weights, hs = zip(*layers, strict=True)
        return list(weights), list(hs)

    return make


def entry(tensors, b):
    return [tensor[b] for tensor in tensors]


def moved(tensors, device):
    return [tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("batch, rows, n, group", CASES)
def test_float64_is_the_reference(device, batch, rows, n, group, make_readers):
    weights, hs = make_readers(batch, rows, n)
    before = [tensor.clone() for tensor in weights + hs]
    result = mk.prune_columns_joint(moved(weights, device), moved(hs, device), group_size=group)
    assert all(map(torch.equal, weights + hs, before))
    assert result.order.shape == (batch, n // group)
    assert result.losses.shape == (batch, len(rows), n // group)
    assert result.losses.dtype == torch.float64
    assert result.damping.tolist() == [[DAMPING] * len(rows)] * batch
    for b in range(batch):
        order, losses = prune_columns_joint_ref(
            entry(weights, b), entry(hs, b), group, n // group, DAMPING
        )
        assert torch.equal(result.order[b].cpu(), order)
        torch.testing.assert_close(result.losses[b].cpu(), losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize("batch, rows, n, group", CASES)
def test_one_reader_is_prune_columns(device, batch, rows, n, group, make_readers):
    (weight, *_), (h, *_) = make_readers(batch, rows, n)
    weight, h = weight.to(device), h.to(device)
    alone = mk.prune_columns(weight, h, group_size=group)
    result = mk.prune_columns_joint([weight], [h], group_size=group)
    assert torch.equal(result.order, alone.order)
    torch.testing.assert_close(result.losses[:, 0], alone.losses, rtol=1e-9, atol=0)
    assert torch.equal(result.damping[:, 0], alone.damping)


@pytest.mark.parametrize("batch, rows, n, group", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_sum_to_each_readers_error(device, batch, rows, n, group, dtype, make_readers):
    weights, hs = make_readers(batch, rows, n, dtype)
    result = mk.prune_columns_joint(moved(weights, device), moved(hs, device), group_size=group)
    relative = 1e-4 if dtype == torch.float32 else 1e-9
    for level in {0, 1, n // group // 2, n // group}:
        kept = result.kept(level, batch - 1)
        assert kept.numel() == n - level * group
        for r, (weight, h) in enumerate(zip(entry(weights, -1), entry(hs, -1), strict=True)):
            fitted = compensate_ref(weight, h, kept, DAMPING)
            error = layer_error_ref(weight, fitted, h, kept, DAMPING)
            total, energy = (float(result.losses[-1, r, :k].sum()) for k in (level, n // group))
            assert total == pytest.approx(error, rel=relative, abs=relative**2 * energy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch, rows, n, group", [(1, (30, 20), 96, 1), (1, (30, 20), 192, 8)])
def test_reduced_precision_reaches_the_same_loss(
    device, dtype, batch, rows, n, group, make_readers
):
    # Near ties of losses may be ranked otherwise: what is compared is the loss reached, each
    # reader's as a share of what it has to lose.
    weights, hs = make_readers(batch, rows, n)
    weights, hs = [w.to(dtype) for w in weights], [h.float() for h in hs]
    count = n // group // 2
    args = dict(group_size=group, count=count, damping=DAMPING)
    result = mk.prune_columns_joint(moved(weights, device), moved(hs, device), **args)
    for b in range(batch):
        layers = entry(weights, b), entry(hs, b)
        _, losses = prune_columns_joint_ref(*layers, group, count, DAMPING)
        wide = [(w.double(), h.double()) for w, h in zip(*layers, strict=True)]
        energy = torch.stack([torch.trace(w @ h @ w.T) for w, h in wide])
        reached = (result.losses[b].cpu().sum(1) / energy).sum()
        assert float(reached) <= float((losses.sum(1) / energy).sum()) * (1 + 1e-4)


def test_ranks_are_fused_by_their_reciprocals():
    # Positions by rank for two readers: 0 is (0, 3), 1 is (1, 1), 2 is (3, 0), 3 is (2, 2). The
    # mean of the reciprocals is convex: the pairs (0, 3) and (3, 0) beat (1, 2), not (1, 1).
    losses = torch.tensor([[1.0, 2.0, 4.0, 3.0], [4.0, 2.0, 1.0, 3.0]])
    assert joint.choose_fused(losses, 2).tolist() == [1, 1]
    losses = torch.tensor([[1.0, 2.0, 4.0, 3.0], [4.0, 3.0, 1.0, 2.0]])
    assert joint.choose_fused(losses, 2).tolist() == [0, 0]
    # groups that are gone are infinitely dear, and no longer count in the sums
    losses = torch.tensor([[INF, 3.0, 1.0], [INF, 1.0, 9.0]])
    assert joint.choose_fused(losses, 2).tolist() == [1, 1]


def test_ties_of_ranks_go_to_the_least_share_then_to_the_lowest_index():
    # ranks (0, 1) and (1, 0); shares of the totals 10 and 100: 0.1 + 0.3 against 0.2 + 0.1
    losses = torch.tensor([[1.0, 2.0, 7.0], [30.0, 10.0, 60.0]])
    assert joint.choose_fused(losses, 2).tolist() == [1, 1]
    # 0.1 + 0.3 against 0.4 + 0.2, though the plain sums are 31 against 24
    losses = torch.tensor([[1.0, 4.0, 5.0], [30.0, 20.0, 50.0]])
    assert joint.choose_fused(losses, 2).tolist() == [0, 0]
    losses = torch.tensor([[1.0, 2.0, 5.0], [2.0, 1.0, 5.0]])
    assert joint.choose_fused(losses, 2).tolist() == [0, 0]
    # equal losses are ranked by index, so that the first is first for every reader
    assert joint.choose_fused(torch.ones(3, 4), 3).tolist() == [0, 0, 0]
    assert joint.choose_fused(torch.zeros(2, 4), 2).tolist() == [0, 0]


def test_sums_of_other_ranks_tie_exactly():
    # 1/63 + 1/84 = 1/72 + 1/72: ranks (2, 23) and (11, 11), the highest sum of forty groups.
    first = list(range(40))
    second = [0] * 40
    second[2], second[11] = 23, 11
    rest = iter(sorted(set(range(40)) - {23, 11}, reverse=True))
    for i in range(40):
        if i not in (2, 11):
            second[i] = next(rest)
    losses = torch.tensor([first, second], dtype=torch.float64)
    assert joint.choose_fused(losses, 2).tolist() == [11, 11]  # 22 against 25 of equal totals
    losses[1, 11:12] -= 0.5
    losses[0, 3:] += 100
    losses[0, 11] -= 0.5
    assert joint.choose_fused(losses, 2).tolist() == [2, 2]  # 2 and 23 against 110.5 and 10.5


@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_choices_are_the_references(readers):
    # Whole numbers that sum to 1024: shares and their sums are exact, and ties abound.
    draw = random.Random(readers)
    for _ in range(200):
        losses = []
        for _ in range(readers):
            small = [float(draw.randrange(6)) for _ in range(7)]
            small.insert(draw.randrange(8), 1024 - sum(small))
            losses.append(small)
        expected = [fused_choice_ref(losses)] * readers
        batch = torch.tensor(losses + losses[::-1])
        assert joint.choose_fused(batch, readers)[:readers].tolist() == expected
        # the order of the readers does not matter, but for ties of equal losses
        gone = torch.cat((torch.full((2 * readers, 1), INF), batch), 1)
        assert joint.choose_fused(gone, readers)[:readers].tolist() == [1 + expected[0]] * readers


def test_ties_of_whole_layers(device):
    weights = [torch.ones(2, 130, device=device), torch.ones(3, 130, device=device)]
    hs = [torch.eye(130, device=device)] * 2
    assert mk.prune_columns_joint(weights, hs, group_size=1).order.tolist() == [list(range(130))]
    result = mk.prune_columns_joint(weights, hs, group_size=13)
    assert result.order.tolist() == [list(range(10))]


@pytest.mark.parametrize("group", [1, 4])
def test_dead_columns(device, group, make_readers):
    weights, hs = make_readers(1, (6, 5), 24)
    everywhere, alone = torch.tensor([8, 9, 10, 11]), torch.tensor([16, 17, 18, 19])
    for h, dead in [(hs[0], everywhere), (hs[1], everywhere), (hs[1], alone)]:
        h[:, dead] = h[:, :, dead] = 0
    result = mk.prune_columns_joint(moved(weights, device), moved(hs, device), group_size=group)
    first = {1: [8, 9, 10, 11], 4: [2]}[group]
    assert result.order[0, : len(first)].tolist() == first
    assert not result.losses[0, :, : len(first)].any()
    order, losses = prune_columns_joint_ref(
        entry(weights, 0), entry(hs, 0), group, 24 // group, DAMPING
    )
    assert torch.equal(result.order[0].cpu(), order)
    torch.testing.assert_close(result.losses[0].cpu(), losses, rtol=1e-9, atol=0)
    one_sided = torch.isin(order, alone // group)
    assert not losses[1, one_sided].any() and (losses[0, one_sided] > 0).all()


def test_a_batch_is_its_entries(device, make_readers):
    weights, hs = (moved(tensors, device) for tensors in make_readers(5, (6, 9), 48))
    whole = mk.prune_columns_joint(weights, hs, group_size=4)
    for b in range(5):
        alone = mk.prune_columns_joint(entry(weights, b), entry(hs, b), group_size=4)
        assert torch.equal(alone.order[0], whole.order[b])
        torch.testing.assert_close(alone.losses[0], whole.losses[b], rtol=1e-12, atol=0)
    needed = joint.joint_bytes(9, 48, 4, 2, 8, hs[0].device)
    for sets in (1, 2, 5):
        part = mk.prune_columns_joint(weights, hs, group_size=4, max_bytes=sets * needed + 1)
        assert torch.equal(part.order, whole.order) and torch.equal(part.damping, whole.damping)
        torch.testing.assert_close(part.losses, whole.losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("group", [1, 8, 32])
def test_a_level_of_the_trajectory_is_a_run_stopped_there(device, group, make_readers):
    weights, hs = (moved(tensors, device) for tensors in make_readers(2, (6, 9), 192))
    whole = mk.prune_columns_joint(weights, hs, group_size=group)
    for count in (0, 1, 192 // group // 3):
        part = mk.prune_columns_joint(weights, hs, group_size=group, count=count)
        assert torch.equal(part.order, whole.order[:, :count])
        assert torch.equal(part.losses, whole.losses[..., :count])
        assert torch.equal(part.kept(count, 1), whole.kept(count, 1))
        assert torch.equal(part.damping, whole.damping)


def test_parameters_are_taken_as_they_are(make_readers):
    weights, hs = make_readers(1, (3, 4), 6)
    result = mk.prune_columns_joint(list(map(torch.nn.Parameter, weights)), hs, group_size=2)
    assert not result.losses.requires_grad


def test_damping_used_is_each_readers_own(make_readers):
    weights, hs = make_readers(2, (3, 5), 4)
    hs[1][0] = 1.0
    result = mk.prune_columns_joint(weights, hs, group_size=2, damping=0.0)
    assert result.damping.tolist() == [[0.0, pytest.approx(1e-8)], [0.0, 0.0]]


def test_what_fails_on_the_way_names_reader_and_entry(make_readers, monkeypatch):
    weights, hs = make_readers(3, (3, 5), 8)
    needed = joint.joint_bytes(5, 8, 2, 2, 8, torch.device("cpu"))
    args = dict(group_size=2, max_bytes=needed)
    broken = [hs[0], hs[1].clone()]
    broken[1][2] = 1000
    broken[1][2].diagonal().fill_(1)
    message = r"hs\[1\] must be positive definite after damping, .* for batch entry 2 with"
    with pytest.raises(RuntimeError, match=message):
        mk.prune_columns_joint(weights, broken, **args)

    whole = joint.inverse_of_entries

    def inverse(h, damping, first=0, label="h"):
        result, used = whole(h, damping, first=first, label=label)
        if label == "hs[1]" and first == 2:
            result[0].diagonal().fill_(-1)
        return result, used

    monkeypatch.setattr(joint, "inverse_of_entries", inverse)
    message = (
        r"prune_columns_joint: the inverse of hs\[1\] must stay positive definite during the "
        "elimination, got a breakdown in batch entry 2 at removal 0 in float64. Pass h in float64"
    )
    with pytest.raises(RuntimeError, match=message):
        mk.prune_columns_joint(weights, hs, **args)


def test_one_set_too_large_is_refused(make_readers, monkeypatch):
    weights, hs = make_readers(1, (4, 6), 8)
    needed = joint.joint_bytes(6, 8, 2, 2, 8, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"max_bytes must be at least {needed}, .* got 1000"):
        mk.prune_columns_joint(weights, hs, group_size=2, max_bytes=1000)
    monkeypatch.setattr(_memory, "available_bytes", lambda device: needed - 1)
    with pytest.raises(RuntimeError, match="prune_columns_joint: a layer needs .* free on cpu"):
        mk.prune_columns_joint(weights, hs, group_size=2)


def test_errors(make_readers):
    weights, hs = make_readers(2, (3, 5), 4)
    (w0, w1), (h0, h1) = weights, hs
    bad, infinite = w1.clone(), h1.clone()
    bad[1, 0, 0], infinite[0, 1, 1] = float("nan"), INF
    trajectory = mk.prune_columns_joint(weights, hs, group_size=2, count=1)
    for arguments, message in [
        ((w0, hs), "weights must be a sequence of tensors, .* got Tensor. Pass"),
        ((weights, h0), "hs must be a sequence of tensors, .* got Tensor. Pass"),
        (([], []), "weights must be .* at least one, got none. Pass"),
        ((weights, hs[:1]), r"weights must be as many as hs \(1\), got 2. Each"),
        (([w0, bad], hs), r"weights\[1\] must be finite, got NaN .* batch entry 1"),
        ((weights, [h0, infinite]), r"hs\[1\] must be finite, got NaN .* batch entry 0. Look"),
        ((weights, [h0, 0 * h1]), r"hs\[1\] must be of positive mean diagonal, .* entries 0, 1"),
        (([w0[0], w1], hs), r"weights\[0\] must be a tensor of 3 dimensions"),
        (([w0, w1[:, :, :3]], hs), r"weights\[1\] must be \(2, m, 4\) to match hs\[1\]"),
        (([w0, w1[:, :0]], hs), r"weights\[1\] must be of at least one row"),
        (([w0, w1.int()], hs), r"weights\[1\] must be bfloat16, float16"),
        (([w0, None], hs), r"weights\[1\] must be a torch tensor, got NoneType"),
        ((weights, [h0, None]), r"hs\[1\] must be a torch tensor, got NoneType"),
        ((weights, [h0.half(), h1]), r"hs\[0\] must be float32 or float64"),
        ((weights, [h0, h1.float()]), r"hs\[1\] must be like hs\[0\], float64 .* got float32"),
        (([w0, w1[:1]], [h0, h1[:1]]), r"hs\[1\] must be like hs\[0\], .*\(2, 4, 4\)"),
        (([w0, w1[..., :2]], [h0, h1[:, :2, :2]]), r"hs\[1\] must be like .* got .*\(2, 2, 2\)"),
        ((weights, [h0, h1[:, :3]]), r"hs\[1\] must be square"),
    ]:
        with pytest.raises(ValueError, match=f"^prune_columns_joint: {message}"):
            mk.prune_columns_joint(*arguments, group_size=2)
    for keywords, message in [
        (dict(group_size=3), "group_size must be a divisor of the 4 columns, got 3. Use"),
        (dict(group_size=0), "group_size must be a divisor of"),
        (dict(group_size=2, count=3), "count must be between 0 and 2, the number .* got 3. Leave"),
        (dict(group_size=2, count=-1), "count must be between 0 and 2"),
        (dict(group_size=2, damping=-1), "damping must be finite and at least 0, got -1. It is"),
    ]:
        with pytest.raises(ValueError, match=f"^prune_columns_joint: {message}"):
            mk.prune_columns_joint(weights, hs, **keywords)
    with pytest.raises(ValueError, match="JointTrajectory.kept: level must be between 0 and 1"):
        trajectory.kept(2)
    with pytest.raises(ValueError, match="JointTrajectory.kept: entry must be between 0 and 1"):
        trajectory.kept(1, 2)
