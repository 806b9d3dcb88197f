"""Single weights of a linear: who goes, how many, and what it costs."""

import numpy as np
import pytest
import torch

import mosaic_kernels as mk
from mosaicdiff.solving.weights import CRITERIA, prune_linear, swap_weights
from mosaicdiff.statistics.bank import HessianBank, Statistics

M, N = 24, 48
PATTERNS = [(2, 4), (4, 8), (1, 4), (3, 4)]


def tokens(n=N, count=600, dead=()):
    """Correlated inputs of unequal scale and mean, with columns that never fire."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, n, generator=generator) @ torch.randn(n, n, generator=generator) / n**0.5
    x = x * torch.linspace(0.2, 2.0, n) + torch.linspace(-1.0, 1.0, n)
    x[:, list(dead)] = 0
    return x


def statistics_of(x):
    bank = HessianBank({"x": x.shape[1]}, torch.device("cpu"))
    bank.update("x", x)
    return bank.finalize("x")


def layer(m=M, n=N):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(5))


def solve(criterion, weight=None, x=None, **target):
    weight = layer() if weight is None else weight
    statistics = statistics_of(tokens() if x is None else x)
    generator = torch.Generator().manual_seed(1)
    return prune_linear(weight, statistics, criterion, generator=generator, **target)


def lowest(scores, count):
    """Mark the `count` least of a flat array; of equal ones the first."""
    marked = np.zeros(scores.size, dtype=bool)
    marked[np.argsort(scores, kind="stable")[:count]] = True
    return marked


def wanda_scores(weight, statistics):
    norms = np.sqrt(statistics.hessian.diagonal().double().numpy())
    return np.abs(weight.double().numpy()) * norms


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"sparsity": 0.83}, {"pattern": (2, 4)}])
def test_obs_is_the_kernel_on_the_same_hessian(target):
    statistics = statistics_of(tokens(dead=(4, 11)))
    solution = prune_linear(layer(), statistics, "obs", damping=0.02, **target)
    expected = mk.prune_weights(layer(), statistics.hessian, damping=0.02, **target)
    assert torch.equal(solution.weight, expected.weight)
    assert torch.equal(solution.mask, expected.mask)
    assert solution.damping == float(expected.damping[0])


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.37, 0.5, 0.9, 1.0])
def test_magnitude_and_wanda_are_their_definitions(sparsity):
    weight, statistics = layer(), statistics_of(tokens(dead=(0, 7)))
    gone = lowest(np.abs(weight.double().numpy()).ravel(), round(sparsity * M * N)).reshape(M, N)
    made = prune_linear(weight, statistics, "magnitude", sparsity=sparsity)
    assert np.array_equal(~made.mask.numpy(), gone)
    rows = [lowest(row, round(sparsity * N)) for row in wanda_scores(weight, statistics)]
    made = prune_linear(weight, statistics, "wanda", sparsity=sparsity)
    assert np.array_equal(~made.mask.numpy(), np.stack(rows))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_patterns_are_their_definition(criterion, pattern):
    weight, statistics = layer(), statistics_of(tokens(dead=(0, 1, 2, 7)))
    scores = np.abs(weight.double().numpy())
    scores = wanda_scores(weight, statistics) if criterion == "wanda" else scores
    keep, of = pattern
    groups = [lowest(group, of - keep) for group in scores.reshape(-1, of)]
    made = prune_linear(weight, statistics, criterion, pattern=pattern)
    assert np.array_equal(~made.mask.numpy(), np.stack(groups).reshape(M, N))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_group_keeps_its_number(criterion, pattern):
    keep, of = pattern
    solution = solve(criterion, pattern=pattern)
    assert (solution.mask.reshape(M, -1, of).sum(-1) == keep).all()
    assert not solution.weight[~solution.mask].any()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.5, 0.777, 1.0])
def test_counts_are_exact(criterion, sparsity):
    gone = ~solve(criterion, sparsity=sparsity).mask
    if criterion in ("wanda", "dsnot"):
        assert (gone.sum(1) == round(sparsity * N)).all()
    else:
        assert gone.sum() == round(sparsity * M * N)


def test_equal_scores_go_in_order():
    for criterion in ("magnitude", "wanda"):
        statistics = Statistics(torch.eye(N), torch.zeros(N), 1.0)
        solution = prune_linear(torch.ones(2, N), statistics, criterion, sparsity=0.25)
        gone = (~solution.mask).nonzero().tolist()
        rows = [[0] * 24] if criterion == "magnitude" else [[0] * 12, [1] * 12]
        columns = [list(range(len(row))) for row in rows]
        assert gone == [[r, c] for row, cs in zip(rows, columns, strict=True)
                        for r, c in zip(row, cs, strict=True)]  # fmt: skip


@pytest.mark.parametrize("criterion", ["obs", "wanda", "dsnot"])
def test_columns_that_never_fired_go_first(criterion):
    solution = solve(criterion, x=tokens(dead=(3, 9, 40)), sparsity=0.1)
    assert not solution.mask[:, [3, 9, 40]].any()


@pytest.mark.parametrize("criterion", CRITERIA[1:])
@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": (2, 4)}], ids=str)
def test_baselines_leave_kept_weights_alone(criterion, target):
    solution = solve(criterion, **target)
    assert torch.equal(solution.weight, layer() * solution.mask)
    assert solution.damping == 0


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_what_the_output_loses(criterion, dtype):
    x, weight = tokens(), layer().to(dtype)
    solution = solve(criterion, weight, x, sparsity=0.5)
    assert solution.weight.dtype == dtype
    dense = x.double() @ weight.double().T
    lost = dense - x.double() @ solution.weight.double().T
    measured = float(lost.square().sum() / dense.square().sum())
    assert solution.error == pytest.approx(measured, rel=1e-5)


def test_compensation_loses_least():
    for target in ({"sparsity": 0.5}, {"pattern": (2, 4)}):
        errors = {c: solve(c, **target).error for c in CRITERIA}
        assert errors["obs"] < 0.8 * min(e for c, e in errors.items() if c != "obs")
        assert errors["wanda"] < errors["random"]


def test_random_follows_its_seed():
    statistics = statistics_of(tokens())
    masks = [
        prune_linear(layer(), statistics, "random", sparsity=0.5,
                     generator=torch.Generator().manual_seed(seed)).mask
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def swap_by_hand(weight, mask, statistics, group, cycles, threshold):
    """Run DSnoT's cycles one by one, every score computed anew, in float64."""
    weight, mask = weight.double().numpy(), mask.numpy().copy()
    mean = statistics.mean.double().numpy()
    square = statistics.hessian.diagonal().double().numpy()
    variance = np.maximum(square - mean**2, 1e-12 * square + np.finfo(float).tiny)
    for r in range(len(weight)):
        share = weight[r] * mean
        start = np.sign(share[~mask[r]].sum())
        for _ in range(cycles):
            error = share[~mask[r]].sum()
            if abs(error) < threshold or np.sign(error) != start:
                break
            best = None
            for g in range(0, weight.shape[1], group):
                inside = range(g, g + group)
                grow = [j for j in inside if not mask[r, j] and start * share[j] > 0]
                drop = [j for j in inside if mask[r, j] and start * share[j] < 0]
                if grow and drop:
                    up = max(grow, key=lambda j: start * share[j] / variance[j])
                    down = min(drop, key=lambda j: abs(weight[r, j]) * square[j] ** 0.5)
                    gain = start * share[up] / variance[up]
                    if best is None or gain > best[0]:
                        best = gain, up, down
            if best is None:
                break
            after = error - share[best[1]] + share[best[2]]
            if abs(after) >= abs(error):
                break
            mask[r, best[1]], mask[r, best[2]] = True, False
    return mask


@pytest.mark.parametrize("cycles, threshold", [(50, 0.1), (50, 0.0), (3, 0.0), (0, 0.0)])
@pytest.mark.parametrize("group", [N, 4, 8])
def test_dsnot_is_its_cycles(cycles, threshold, group):
    weight, statistics = layer(), statistics_of(tokens(dead=(6,)))
    target = {"sparsity": 0.6} if group == N else {"pattern": (group // 2, group)}
    mask = prune_linear(weight, statistics, "wanda", **target).mask
    options = {"group": group, "cycles": cycles, "threshold": threshold}
    swapped = swap_weights(weight, mask, statistics, **options)
    assert np.array_equal(swapped.numpy(), swap_by_hand(weight, mask, statistics, **options))
    assert torch.equal(swapped, mask) == (cycles == 0)
    assert torch.equal(swapped.reshape(M, -1, group).sum(-1), mask.reshape(M, -1, group).sum(-1))
    if (cycles, threshold) == (50, 0.1):
        assert torch.equal(prune_linear(weight, statistics, "dsnot", **target).mask, swapped)


@pytest.mark.parametrize("target", [{"sparsity": 0.3}, {"sparsity": 0.9}, {"pattern": (2, 4)}])
def test_dsnot_never_worsens_a_row(target):
    statistics = statistics_of(tokens())
    share = layer().double() * statistics.mean.double()
    errors = [
        (share * ~prune_linear(layer(), statistics, c, **target).mask).sum(1).abs()
        for c in ("wanda", "dsnot")
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-12)).all()
    assert errors[1].sum() < 0.5 * errors[0].sum()


def test_dsnot_of_a_centred_input_is_wanda():
    statistics = Statistics(torch.diag(torch.rand(N) + 0.5), torch.zeros(N), 1.0)
    masks = [prune_linear(layer(), statistics, c, sparsity=0.5).mask for c in ("wanda", "dsnot")]
    assert torch.equal(*masks)


def test_an_input_that_never_fired_loses_nothing():
    statistics = Statistics(torch.zeros(N, N), torch.zeros(N), 1.0)
    assert prune_linear(layer(), statistics, "wanda", sparsity=0.5).error == 0.0
    with pytest.raises(ValueError, match="prune_weights: "):
        prune_linear(layer(), statistics, "obs", sparsity=0.5)


def test_the_weight_given_is_not_changed():
    weight = torch.nn.Parameter(layer())
    solution = solve("obs", weight, sparsity=0.5)
    assert torch.equal(weight, layer()) and not solution.weight.requires_grad


SPOILED = layer().index_fill(1, torch.tensor([3]), float("nan"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"criterion": "best"}, "criterion must be one of obs, magnitude, .* got 'best'"),
        ({"weight": torch.ones(3)}, r"weight must be \(m, n\), floating and finite, got \(3,\)"),
        ({"weight": torch.ones(2, N, dtype=torch.int8)}, ".*floating and finite, .* torch.int8"),
        ({"weight": SPOILED}, "weight must be .* finite"),
        ({"weight": layer(4, 40)}, r"statistics must be of the 40 inputs, got .*\(48, 48\)"),
        ({"sparsity": None}, "sparsity must be given, or else pattern, got None and None"),
        ({"pattern": (2, 4)}, r"sparsity must be given, or else pattern, got 0.5 and \(2, 4\)"),
        ({"sparsity": 1.2}, r"sparsity must be in \[0, 1\], got 1.2"),
        ({"sparsity": float("nan")}, r"sparsity must be in \[0, 1\], got nan"),
        ({"sparsity": None, "pattern": (4, 4)}, r"pattern must be \(keep, of\) with 1 <= keep"),
        ({"sparsity": None, "pattern": (2, 5)},
         "pattern must be of groups that divide the 48 inputs, got 2:5. Leave .* by `exclude`"),
        ({"criterion": "random", "generator": None}, "generator must be given with criterion"),
    ],
)  # fmt: skip
def test_bad_requests_are_told(change, message):
    asked = {"weight": layer(), "criterion": "obs", "sparsity": 0.5} | change
    weight, criterion = asked.pop("weight"), asked.pop("criterion")
    with pytest.raises(ValueError, match=f"^prune_linear: {message}"):
        prune_linear(weight, statistics_of(tokens()), criterion, **asked)
