"""Choice and fit of single layers, against float64 least squares written out."""

import pytest
import torch

from mosaicdiff.groups import Columns, PrunableLayer, Rows
from mosaicdiff.solving.solve import LayerProblem, Reader, fit_layer, trace_along, trace_layers
from mosaicdiff.statistics.bank import HessianBank, Statistics

REMOVE = 4


def problem(groups=12, width=1, rows=10, bias=True, tokens=400, seed=0, dead=()):
    generator = torch.Generator().manual_seed(seed)
    n = groups * width
    mixing = torch.randn(n, n, generator=generator)
    x = torch.randn(tokens, n, generator=generator) @ mixing / n**0.5 + 0.5
    for group in dead:
        x[:, group * width : (group + 1) * width] = 0
    hessian, mean = x.T @ x / tokens, x.mean(0)
    layer = PrunableLayer(
        "l", "heads" if width > 1 else "neurons", (Columns("r"),), (Rows("w"),), groups, width, 1
    )
    weight = torch.randn(rows, n, generator=generator)
    statistics = Statistics(hessian, mean, float(tokens))
    bias = torch.randn(rows, generator=generator) if bias else None
    return x, LayerProblem(layer, (Reader(weight, bias, statistics),))


def solve(row, criterion="obs", compensation="plain", damping=1e-6, seed=0, remove=REMOVE):
    generator = torch.Generator().manual_seed(seed)
    curve = trace_layers([row], criterion, compensation, damping, generator)[0]
    return fit_layer(row, curve.kept(remove), compensation, curve.damping)


def output_error(x, row, solution):
    columns = row.layer.columns(solution.kept)
    x, weight = x.double(), row.readers[0].weight.double()
    dense, small = x @ weight.T, x[:, columns] @ solution.readers[0].weight.double().T
    if row.readers[0].bias is not None:
        dense = dense + row.readers[0].bias.double()
    if solution.readers[0].bias is not None:
        small = small + solution.readers[0].bias.double()
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
    best = torch.linalg.lstsq(kept, x.double() @ row.readers[0].weight.double().T).solution.T
    torch.testing.assert_close(solution.readers[0].weight.double(), best, rtol=1e-3, atol=1e-4)


def test_each_refinement_lowers_the_error():
    x, row = problem(groups=40, tokens=2000)
    errors = {
        name: solve(row, *name, remove=20).error
        for name in [("magnitude", "none"), ("magnitude", "plain"), ("obs", "plain")]
    }
    assert errors["obs", "plain"] < errors["magnitude", "plain"] < errors["magnitude", "none"]
    assert solve(row, "magnitude", "affine", remove=20).error <= errors["magnitude", "plain"] + 1e-6


def test_nothing_to_remove_returns_the_layer_itself():
    _, row = problem()
    solution = solve(row, remove=0)
    assert solution.readers[0].weight is row.readers[0].weight and solution.error == 0.0


def test_everything_removed_leaves_the_bias():
    x, row = problem()
    plain, affine = solve(row, remove=12), solve(row, compensation="affine", remove=12)
    (plain,), (affine,) = plain.readers, affine.readers
    assert plain.weight.shape == (10, 0) and torch.equal(plain.bias, row.readers[0].bias)
    shift = row.readers[0].weight @ x.mean(0)
    torch.testing.assert_close(affine.bias, row.readers[0].bias + shift, rtol=1e-4, atol=1e-5)


def test_dead_groups_go_first_at_no_loss():
    x, row = problem(dead=(2, 7, 9))
    solution = solve(row, remove=3)
    assert set(range(12)) - set(solution.kept.tolist()) == {2, 7, 9}
    assert solution.error < 1e-10


def test_random_depends_on_the_seed_only():
    _, row = problem(groups=60)
    picks = [solve(row, "random", "none", seed=s, remove=30).kept.tolist() for s in (1, 1, 2)]
    assert picks[0] == picks[1] != picks[2]


def test_layers_of_several_shapes_come_back_in_order():
    rows = [problem(groups=g, seed=g)[1] for g in (12, 6, 13, 12)]
    curves = trace_layers(rows, "obs", "plain", 0.01, torch.Generator())
    assert [len(c.order) for c in curves] == [12, 6, 13, 12]
    alone = trace_layers(rows[2:3], "obs", "plain", 0.01, torch.Generator())[0]
    assert torch.equal(curves[2].order, alone.order)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("compensation", ["plain", "affine", "none"])
@pytest.mark.parametrize("criterion", ["obs", "magnitude", "random"])
def test_a_curve_is_the_error_at_every_level(criterion, compensation, width):
    x, row = problem(width=width, bias=False)
    damping = 1e-9 if compensation != "none" else 0.0
    curve = trace_layers([row], criterion, compensation, damping, torch.Generator())[0]
    energy = (x.double() @ row.readers[0].weight.double().T).square().sum(1).mean()
    for level in (0, 1, 5, 11, 12):
        solution = fit_layer(row, curve.kept(level), compensation, curve.damping)
        assert curve.errors()[level] / energy == pytest.approx(solution.error, rel=2e-3, abs=1e-7)


def test_a_given_order_and_a_traced_one_agree():
    _, row = problem(groups=30, tokens=2000)
    curve = trace_layers([row], "obs", "plain", 0.01, torch.Generator())[0]
    again = trace_along(row, curve.order, "plain", curve.damping)
    assert again.losses[0] == pytest.approx(curve.losses[0], rel=1e-3)


def test_a_hopeless_hessian_names_the_layer():
    _, row = problem()
    (reader,) = row.readers
    zero = Statistics(torch.zeros(12, 12), torch.zeros(12), 1.0)
    with pytest.raises((ValueError, RuntimeError), match="0: r"):
        solve(LayerProblem(row.layer, (Reader(reader.weight, reader.bias, zero),)))


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
