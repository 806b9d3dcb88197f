"""Where statistics come from: draws, noising, hooks."""

import pytest
import torch

from mosaicdiff.adapters import adapter_for
from mosaicdiff.config import PruneConfig
from mosaicdiff.groups import input_widths
from mosaicdiff.statistics.capture import capture_inputs
from mosaicdiff.statistics.noising import CalibrationSet, add_noise, collect_statistics
from mosaicdiff.trajectory.schedule import NoiseSchedule
from mosaicdiff.trajectory.stages import Stage

from .conftest import tiny_batches, tiny_denoiser

SCHEDULE = NoiseSchedule.named("linear")


MIDDLE = Stage("middle", 200, 400)


def collect(denoiser, **config):
    adapter = adapter_for(denoiser)
    layers = adapter.layers(denoiser)
    data = CalibrationSet(tiny_batches(), adapter, denoiser)
    config = PruneConfig(**({"samples": 40, "batch_size": 16} | config))
    widths = input_widths(layers)
    bank = collect_statistics(denoiser, adapter, widths, MIDDLE, SCHEDULE, data, config)
    return layers, bank


def test_statistics_equal_recorded_activations():
    denoiser = tiny_denoiser()
    seen: dict[str, list] = {}
    names = [layer.readers[0].name for layer in adapter_for(denoiser).layers(denoiser)]
    with capture_inputs(denoiser, names, lambda n, x: seen.setdefault(n, []).append(x)):
        layers, bank = collect(denoiser)
    for layer in layers:
        x = torch.cat([t.reshape(-1, t.shape[-1]) for t in seen[layer.readers[0].name]]).double()
        got = bank.finalize(layer.readers[0].name)
        assert got.weight == len(x) == 40 * 16
        torch.testing.assert_close(got.hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_timesteps_stay_in_the_stage_and_the_null_share_is_drawn():
    denoiser, calls = tiny_denoiser(), []

    def note(module, args, kwargs):
        calls.append((kwargs["timestep"], kwargs["class_labels"]))

    denoiser.register_forward_pre_hook(note, with_kwargs=True)
    collect(denoiser, samples=400, batch_size=100, null_share=0.25)
    timesteps, labels = (torch.cat(rows) for rows in zip(*calls, strict=True))
    assert len(timesteps) == 400
    assert timesteps.min() >= 200 and timesteps.max() <= 400 and len(timesteps.unique()) > 100
    assert 0.15 < (labels == 1000).double().mean() < 0.35
    calls.clear()
    collect(denoiser, null_share=0.0)
    assert all((labels < 10).all() for _, labels in calls)


def test_the_seed_decides():
    denoiser = tiny_denoiser()
    sums = [collect(denoiser, seed=seed)[1]._sums for seed in (0, 0, 1)]
    name = next(iter(sums[0]))
    assert torch.equal(sums[0][name][0], sums[1][name][0])
    assert not torch.equal(sums[0][name][0], sums[2][name][0])


def test_every_sample_is_used_before_any_is_used_again():
    denoiser = tiny_denoiser()
    data = CalibrationSet(tiny_batches(10), adapter_for(denoiser), denoiser)
    drawn = torch.cat([x for x, _ in data.draw(20, 7, torch.Generator().manual_seed(0))])
    distinct, counts = drawn.flatten(1).unique(dim=0, return_counts=True)
    assert len(distinct) == 10 and (counts == 2).all()


def test_noise_is_that_of_the_scheduler():
    from .conftest import linear_scheduler

    x, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    expected = linear_scheduler().add_noise(x, noise, t)
    schedule = NoiseSchedule.from_scheduler(linear_scheduler())
    torch.testing.assert_close(add_noise(schedule, x, noise, t), expected, rtol=1e-4, atol=1e-5)


def test_hooks_go_whatever_happens():
    denoiser = tiny_denoiser()
    name = adapter_for(denoiser).layers(denoiser)[0].readers[0].name
    with pytest.raises(KeyboardInterrupt), capture_inputs(denoiser, [name], lambda n, x: None):
        raise KeyboardInterrupt
    assert not denoiser.get_submodule(name)._forward_pre_hooks


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "must hold at least one sample, got none"),
        ([(torch.zeros(0, 2, 8, 8), {"class_labels": torch.zeros(0).long()})], "at least one"),
        ([(torch.full((1, 2, 8, 8), torch.nan), {"class_labels": torch.ones(1).long()})], "NaN"),
        ([(torch.zeros(1, 4, 8, 8), {"class_labels": torch.ones(1).long()})], r"\(B, 2, 8, 8\)"),
        ([(torch.zeros(1, 2, 8, 8), {"class_labels": torch.tensor([1001])})], r"0\.\.1000"),
        ([(torch.zeros(1, 2, 8, 8), {"class_labels": torch.tensor([-1])})], r"0\.\.1000"),
        ([(torch.zeros(2, 2, 8, 8), {"class_labels": torch.tensor([1])})], "whole numbers"),
        ([(torch.zeros(1, 2, 8, 8), {"class_labels": torch.ones(1)})], "whole numbers"),
        ([(torch.zeros(1, 2, 8, 8), {"labels": torch.ones(1)})], "class_labels"),
    ],
)
def test_bad_batches_are_refused(batches, message):
    denoiser = tiny_denoiser()
    with pytest.raises(ValueError, match=message):
        CalibrationSet(batches, adapter_for(denoiser), denoiser)
