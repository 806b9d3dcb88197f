"""Choice and fit of single layers, against float64 least squares written out."""

import pytest
import torch

from mosaicdiff.bank import HessianBank, Statistics
from mosaicdiff.groups import PrunableLayer
from mosaicdiff.solve import LayerProblem, solve_layers


def problem(groups=12, width=1, rows=10, remove=4, bias=True, tokens=400, seed=0, dead=()):
    generator = torch.Generator().manual_seed(seed)
    n = groups * width
    mixing = torch.randn(n, n, generator=generator)
    x = torch.randn(tokens, n, generator=generator) @ mixing / n**0.5 + 0.5
    for group in dead:
        x[:, group * width : (group + 1) * width] = 0
    hessian, mean = x.T @ x / tokens, x.mean(0)
    layer = PrunableLayer("l", "heads" if width > 1 else "neurons", "r", ("w",), groups, width, 1)
    weight = torch.randn(rows, n, generator=generator)
    statistics = Statistics(hessian, mean, float(tokens))
    return x, LayerProblem(
        layer, weight, torch.randn(rows, generator=generator) if bias else None, statistics, remove
    )


def solve(row, criterion="obs", compensation="plain", damping=1e-6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return solve_layers([row], criterion, compensation, damping, generator)[0]


def output_error(x, row, solution):
    columns = row.layer.columns(solution.kept)
    x, weight = x.double(), row.weight.double()
    dense, small = x @ weight.T, x[:, columns] @ solution.weight.double().T
    if row.bias is not None:
        dense = dense + row.bias.double()
    if solution.bias is not None:
        small = small + solution.bias.double()
    energy = (x @ weight.T).square().sum()
    return float((dense - small).square().sum() / energy)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compensation", ["plain", "affine", "none"])
@pytest.mark.parametrize("criterion", ["obs", "magnitude", "wanda", "random"])
def test_error_is_that_of_the_outputs(criterion, compensation, bias, width):
    x, row = problem(width=width, bias=bias)
    solution = solve(row, criterion, compensation)
    assert len(solution.kept) == 8
    assert solution.error == pytest.approx(output_error(x, row, solution), rel=1e-3)


def test_plain_compensation_is_least_squares():
    x, row = problem(bias=False)
    solution = solve(row, "magnitude", "plain", damping=0.0)
    kept = x[:, row.layer.columns(solution.kept)].double()
    best = torch.linalg.lstsq(kept, x.double() @ row.weight.double().T).solution.T
    torch.testing.assert_close(solution.weight.double(), best, rtol=1e-3, atol=1e-4)


def test_each_refinement_lowers_the_error():
    x, row = problem(groups=40, remove=20, tokens=2000)
    errors = {
        name: solve(row, *name).error
        for name in [("magnitude", "none"), ("magnitude", "plain"), ("obs", "plain")]
    }
    assert errors["obs", "plain"] < errors["magnitude", "plain"] < errors["magnitude", "none"]
    assert solve(row, "magnitude", "affine").error <= errors["magnitude", "plain"] + 1e-6


def test_nothing_to_remove_returns_the_layer_itself():
    _, row = problem(remove=0)
    solution = solve(row)
    assert solution.weight is row.weight and solution.error == 0.0


def test_everything_removed_leaves_the_bias():
    x, row = problem(remove=12)
    plain, affine = solve(row), solve(row, compensation="affine")
    assert plain.weight.shape == (10, 0) and torch.equal(plain.bias, row.bias)
    shift = row.weight @ x.mean(0)
    torch.testing.assert_close(affine.bias, row.bias + shift, rtol=1e-4, atol=1e-5)


def test_dead_groups_go_first_at_no_loss():
    x, row = problem(remove=3, dead=(2, 7, 9))
    solution = solve(row)
    assert set(range(12)) - set(solution.kept.tolist()) == {2, 7, 9}
    assert solution.error < 1e-10


def test_random_depends_on_the_seed_only():
    _, row = problem(groups=60, remove=30)
    picks = [solve(row, "random", "none", seed=s).kept.tolist() for s in (1, 1, 2)]
    assert picks[0] == picks[1] != picks[2]


def test_layers_of_several_shapes_come_back_in_order():
    rows = [problem(groups=g, remove=r)[1] for g, r in [(12, 4), (6, 1), (12, 2)]]
    solved = solve_layers(rows, "obs", "plain", 0.01, torch.Generator())
    assert [len(s.kept) for s in solved] == [8, 5, 10]


def test_a_hopeless_hessian_names_the_layer():
    _, row = problem()
    zero = Statistics(torch.zeros(12, 12), torch.zeros(12), 1.0)
    with pytest.raises((ValueError, RuntimeError), match="0: r"):
        solve(LayerProblem(row.layer, row.weight, row.bias, zero, 4))


def test_bank_equals_sums_by_hand():
    bank = HessianBank({"r": 6}, torch.device("cpu"))
    first, second = torch.randn(2, 5, 6), torch.randn(3, 6)
    bank.update("r", first)
    bank.update("r", second, weight=0.5)
    got = bank.finalize("r")
    a, b = first.reshape(-1, 6).double(), second.double()
    weight = 10 + 0.5 * 3
    torch.testing.assert_close(got.hessian.double(), (a.T @ a + 0.5 * b.T @ b) / weight)
    torch.testing.assert_close(got.mean.double(), (a.sum(0) + 0.5 * b.sum(0)) / weight)
    assert got.weight == weight


def test_a_reader_that_saw_nothing_or_nan_is_named():
    bank = HessianBank({"quiet": 3, "sick": 3}, torch.device("cpu"))
    with pytest.raises(ValueError, match="input of quiet"):
        bank.finalize("quiet")
    bank.update("sick", torch.tensor([[1.0, float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="input of sick"):
        bank.finalize("sick")
