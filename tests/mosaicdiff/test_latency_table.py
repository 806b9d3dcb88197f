"""The measured table of layer costs, mostly under a timer that counts weights."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mosaicdiff.allocation.latency as latency
from mosaicdiff.adapters import adapter_for
from mosaicdiff.allocation.latency import LatencyTable, latency_table, measure_table, shape_of
from mosaicdiff.allocation.timing import (
    LEAST_MILLISECONDS,
    MOST_CALLS,
    default_timer,
    isotonic,
    widths,
)

from .conftest import tiny_denoiser


def weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def timed(call) -> nn.Module:
    """The module that a call runs: its own, or the denoiser that an adapter calls."""
    return call.func if isinstance(call.func, nn.Module) else call.args[0]


def count_weights(call) -> float:
    """A timer: a thousand weights of linear layers take a millisecond."""
    return weights(timed(call)) / 1000


def measure(denoiser, timer=count_weights, **options) -> LatencyTable:
    return measure_table(denoiser, adapter_for(denoiser), timer=timer, **options)


def shapes(denoiser):
    layers = adapter_for(denoiser).layers(denoiser)
    return {layer.kind: shape_of(denoiser, layer) for layer in layers}


def replaced(table: LatencyTable, **values) -> LatencyTable:
    return dataclasses.replace(table, **values)


@pytest.fixture
def measured(monkeypatch):
    """Batch sizes of the measurements that `latency_table` asks for, made by the fake timer."""
    asked = []

    def fake(denoiser, adapter, *, batch_size, **options):
        asked.append(batch_size)
        return measure(denoiser, batch_size=batch_size, **options)

    monkeypatch.setattr(latency, "measure_table", fake)
    return asked


def test_the_curves_are_those_of_the_narrowed_layers(denoiser):
    table = measure(denoiser)
    shape = shapes(denoiser)
    assert set(table.curves) == set(shape.values())  # one of each, however many blocks
    heads, neurons = shape["heads"], shape["neurons"]
    # Four projections of 32 features to a head of 8; two of 32 features to a neuron.
    assert table.curves[heads] == ((0, 1, 2, 3, 4), tuple(4 * 32 * 8 * k / 1000 for k in range(5)))
    kept, milliseconds = table.curves[neurons]
    assert kept == (0, 8, 16, 32, 48, 64, 80, 96, 112, 128)
    assert milliseconds == pytest.approx([2 * 32 * k / 1000 for k in kept])
    assert table.dense_ms == weights(denoiser) / 1000
    prunable = sum(
        weights(block.attn1) + weights(block.ff) for block in denoiser.transformer_blocks
    )
    assert table.fixed_ms == pytest.approx((weights(denoiser) - prunable) / 1000)
    assert table.excess_ms == 0


def test_a_sum_of_layers_above_the_dense_call_is_told(denoiser):
    table = measure(denoiser, lambda call: 1.0 if timed(call) is denoiser else count_weights(call))
    prunable = sum(
        weights(block.attn1) + weights(block.ff) for block in denoiser.transformer_blocks
    )
    assert table.fixed_ms == 0
    assert table.excess_ms == pytest.approx(prunable / 1000 - 1)


def test_between_measured_widths_run_lines(denoiser):
    table = measure(denoiser)
    shape = shapes(denoiser)["neurons"]
    table.curves[shape] = (0, 8, 128), (0.0, 4.0, 10.0)
    assert table.milliseconds(shape, 2) == 1.0
    assert table.milliseconds(shape, 68) == 7.0
    curve = table.curve(shape, 128)
    assert curve.shape == (129,) and curve.dtype == np.float64
    assert curve.tolist() == [table.milliseconds(shape, k) for k in range(129)]
    assert np.array_equal(table.curve(shape), curve)
    assert np.array_equal(table.curve(shape, 20), curve[:21])
    for kept in (-1, 129):
        with pytest.raises(ValueError, match=rf"kept must be in 0..128, got {kept}\."):
            table.milliseconds(shape, kept)
        with pytest.raises(ValueError, match=rf"groups must be in 0..128, got {kept}\."):
            table.curve(shape, kept)


def test_rounds_are_interleaved_and_the_first_is_not_counted(denoiser):
    order, rounds = [], []

    def timer(call):
        order.append(call)
        return (1000.0, 1.0, 5.0, 2.0)[len(rounds)]

    table = measure(denoiser, timer, repeats=3, advance=lambda: rounds.append(1))
    assert len(rounds) == 4
    once = order[: len(order) // 4]
    assert len(set(map(id, once))) == len(once) and order == once * 4
    assert timed(once[0]) is denoiser
    assert table.dense_ms == 2.0
    assert all(set(ms) == {2.0} for _, ms in table.curves.values())


def test_a_wider_layer_never_costs_less(denoiser):
    shape = shapes(denoiser)["heads"]
    noisy = iter([9.0, 1.0, 3.0, 2.0, 4.0, 3.5] + [1.0] * 10)
    times = {}

    def timer(call):
        return times.setdefault(id(call), next(noisy, 1.0))

    assert measure(denoiser, timer).curves[shape][1] == (1.0, 2.5, 2.5, 3.75, 3.75)


def test_isotonic_is_the_nearest_non_decreasing_sequence():
    assert isotonic([1, 2, 2, 5]) == (1, 2, 2, 5)
    assert isotonic([3, 2, 1]) == (2, 2, 2)
    assert isotonic([1, 4, 4, 1, 6]) == (1, 3, 3, 3, 6)
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.normal(size=8)
        fit = np.array(isotonic(values.tolist()))
        assert (np.diff(fit) >= 0).all()
        # Karush-Kuhn-Tucker: the residual is orthogonal to the fit and to no step upward.
        residual = values - fit
        assert residual.sum() == pytest.approx(0) and residual @ fit == pytest.approx(0)
        assert (np.cumsum(residual[::-1]) < 1e-9).all()


def test_widths(denoiser):
    heads, neurons, *_ = adapter_for(denoiser).layers(denoiser)
    tiled = dataclasses.replace(neurons, groups=4608)
    assert widths(tiled, 9) == (0, 8, *range(576, 4609, 576))
    odd = widths(dataclasses.replace(neurons, groups=1000), 9)
    assert odd[:2] == (0, 8) and odd[-1] == 1000
    assert all(k % 64 == 0 for k in odd[2:-1])
    assert widths(dataclasses.replace(heads, groups=18), 9) == tuple(range(19))
    assert widths(dataclasses.replace(heads, groups=24), 9) == (0, 1, 3, 6, 9, 12, 15, 18, 21, 24)


def test_a_table_survives_its_file(denoiser, tmp_path):
    table = measure(denoiser, batch_size=3)
    table.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json")
    assert again == table
    again.check(denoiser, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layout": 2}', '{"layout": 1, "curves": [3]}'])
def test_what_is_no_table_is_refused(text, tmp_path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match="Measure the table again by measure_table"):
        LatencyTable.load(tmp_path / "table.json")


def test_a_table_of_other_conditions_is_refused(denoiser):
    table = measure(denoiser, batch_size=2)
    table.check(denoiser, 2)
    other_gpu = replaced(table, device="NVIDIA A100-SXM4-80GB")
    with pytest.raises(ValueError, match=r"device must be 'cpu .* threads', .* got 'NVIDIA A100"):
        other_gpu.check(denoiser, 2)
    with pytest.raises(ValueError, match="batch_size must be 4, .* got 2. Measure one for this"):
        table.check(denoiser, 4)
    with pytest.raises(ValueError, match="torch must be .* got '1.0'. Measure one with"):
        replaced(table, torch="1.0").check(denoiser, 2)
    with pytest.raises(ValueError, match="dtype must be 'bfloat16', .* got 'float32'"):
        table.check(tiny_denoiser().bfloat16(), 2)
    with pytest.raises(ValueError, match="shape must be one of the 2 measured, got LayerShape"):
        table.check(tiny_denoiser(heads=3), 2)
    with pytest.raises(ValueError, match="network must be .* Measure one of this denoiser"):
        table.check(tiny_denoiser(layers=2), 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        message = f"must be '.*, {threads + 1} threads', .* got '.*, {threads} threads'"
        with pytest.raises(ValueError, match=message):
            table.check(denoiser, 2)
    finally:
        torch.set_num_threads(threads)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match="dtype must be 'float32, high matmul precision'"):
            table.check(denoiser, 2)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_a_stored_table_is_used_again(denoiser, tmp_path, measured):
    adapter = adapter_for(denoiser)
    first = latency_table(denoiser, adapter, cache=tmp_path)
    assert latency_table(tiny_denoiser(), adapter, cache=tmp_path) == first
    assert measured == [1]
    latency_table(denoiser, adapter, cache=tmp_path, refresh=True)
    assert measured == [1, 1]
    latency_table(denoiser, adapter, batch_size=2, cache=tmp_path)
    assert measured == [1, 1, 2]
    latency_table(tiny_denoiser().bfloat16(), adapter, batch_size=2, cache=tmp_path)
    assert measured == [1, 1, 2, 2]
    latency_table(denoiser, adapter, batch_size=2, cache=tmp_path)
    assert measured == [1, 1, 2, 2] and len(list(tmp_path.iterdir())) == 3
    latency_table(denoiser, adapter, cache=None)
    assert measured == [1, 1, 2, 2, 1] and len(list(tmp_path.iterdir())) == 3


def test_a_stored_table_that_does_not_hold_is_refused(denoiser, tmp_path, measured):
    adapter = adapter_for(denoiser)
    table = latency_table(denoiser, adapter, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    for text in ("{", json.dumps(table.to_dict() | {"device": "another"})):
        path.write_text(text)
        with pytest.raises(ValueError, match="LatencyTable"):
            latency_table(denoiser, adapter, cache=tmp_path)
    assert latency_table(denoiser, adapter, cache=tmp_path, refresh=True) == table
    assert len(measured) == 2


def test_the_cache_is_the_users(denoiser, tmp_path, monkeypatch, measured):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    latency_table(denoiser, adapter_for(denoiser))
    assert len(list((tmp_path / "xdg/mosaicdiff/latency").glob("*.json"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    latency_table(denoiser, adapter_for(denoiser))
    assert len(list((tmp_path / "home/.cache/mosaicdiff/latency").glob("*.json"))) == 1
    assert len(measured) == 2


def test_a_cache_that_cannot_be_written_is_refused_before_measuring(denoiser, tmp_path, measured):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cache must be a folder that can be written"):
            latency_table(denoiser, adapter_for(denoiser), cache=Path(cache))
    assert measured == []


@pytest.mark.parametrize("name, least", [("batch_size", 1), ("points", 2), ("repeats", 1)])
def test_bad_arguments_are_refused(denoiser, name, least):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {least - 1}"):
        measure(denoiser, **{name: least - 1})


def test_a_device_without_a_clock_is_refused():
    with pytest.raises(ValueError, match="on the CPU or a CUDA device, got mps"):
        default_timer(torch.device("mps"))


def test_short_calls_are_timed_in_a_row(monkeypatch):
    now, made = [0.0], []

    def spend(seconds):
        made.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("mosaicdiff.allocation.timing.time.perf_counter", lambda: now[0])
    timer = default_timer(torch.device("cpu"))
    assert timer(lambda: spend(0.25)) == 250 and len(made) == 1
    made.clear()
    assert timer(lambda: spend(2.0**-13)) == 1e3 * 2**-13
    assert len(made) == 1 + 2 + 4 + 8 + 16 and 16 * 1e3 * 2**-13 >= LEAST_MILLISECONDS
    made.clear()
    assert timer(lambda: spend(0.0)) == 0 and len(made) == 2 * MOST_CALLS - 1


@pytest.mark.parametrize("mode", [True, False])
def test_measuring_leaves_the_denoiser_as_it_was(denoiser, mode):
    denoiser.train(mode)
    denoiser.transformer_blocks[1].train(not mode)
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    state = [
        (m, m.training, list(m._modules.values()), len(m._parameters)) for m in denoiser.modules()
    ]
    seen = set()

    def timer(call):
        output = call()
        seen.add(tuple((output if isinstance(output, torch.Tensor) else output[0]).shape))
        return default_timer(torch.device("cpu"))(call)

    table = measure_table(
        denoiser,
        adapter_for(denoiser),
        batch_size=2,
        points=3,
        repeats=1,
        timer=timer,
    )
    assert seen == {(2, 2, 8, 8), (2, 16, 32)}  # a layer has the tokens of a real call
    numbers = [table.dense_ms, table.fixed_ms, *(t for _, ms in table.curves.values() for t in ms)]
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    assert table.dense_ms > 0 and all(ms[-1] > 0 for _, ms in table.curves.values())
    after = denoiser.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert state == [
        (m, m.training, list(m._modules.values()), len(m._parameters)) for m in denoiser.modules()
    ]
    assert denoiser.transformer_blocks[0].attn1.heads == 4
    assert not hooks(denoiser)


def hooks(denoiser):
    return [m for m in denoiser.modules() if m._forward_pre_hooks or m._forward_hooks]


def test_hooks_go_even_if_the_call_raises(denoiser, monkeypatch):
    def fail(*args, **kwargs):
        assert hooks(denoiser)
        raise RuntimeError("out of memory")

    denoiser.train()
    monkeypatch.setattr(denoiser.transformer_blocks[2], "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(denoiser)
    assert not hooks(denoiser)
    assert denoiser.training


def test_narrowed_layers_compute_with_no_dropout_and_no_gradient(denoiser):
    denoiser.requires_grad_(True).train()
    states = set()

    def timer(call):
        training = any(module.training for module in timed(call).modules())
        states.add((torch.is_grad_enabled(), training))
        return count_weights(call)

    measure(denoiser, timer)
    assert states == {(False, False)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_table_of_a_gpu():
    denoiser = tiny_denoiser().cuda().half()
    table = measure_table(denoiser, adapter_for(denoiser), batch_size=2, points=3, repeats=2)
    assert table.device == torch.cuda.get_device_name() and table.dtype == "float16"
    assert 0 < table.dense_ms < math.inf
    table.check(denoiser, 2)
