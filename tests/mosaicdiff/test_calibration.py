"""What a calibration holds in memory: half of every H, and bins that join exactly."""

import pytest
import torch

from mosaicdiff import PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.pipeline import calibrate
from mosaicdiff.statistics.calibration import (
    PackedStatistics,
    pack_symmetric,
    packed_bytes,
    unpack_symmetric,
)
from mosaicdiff.trajectory.stages import Division

from .conftest import linear_scheduler, tiny_batches, tiny_denoiser

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bins():
    """The tiny model calibrated in bins, with all that may be measured besides."""
    config = PruneConfig(
        samples=16, steps=20, stages="auto", bins=4, allocation="optimal",
        granularity="layers", depth_rank="error", weighting="sensitivity",
    )  # fmt: skip
    return calibrate(
        tiny_denoiser(), config, scheduler=linear_scheduler(), calibration=tiny_batches()
    )


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33, 64, 65])
def test_half_of_a_symmetric_matrix_gives_the_whole_back_bit_for_bit(n):
    matrix = torch.randn(n, n)
    matrix = matrix + matrix.T
    packed = pack_symmetric(matrix)
    assert torch.equal(unpack_symmetric(packed, n), matrix)
    even = n + n % 2
    assert packed.numel() == even * (even + 1) // 2


def test_packed_statistics_are_as_large_as_is_said(bins):
    layers = adapter_for(tiny_denoiser()).layers(tiny_denoiser())
    held = sum(
        4 * (packed.hessian.numel() + packed.mean.numel())
        for bin_ in bins.statistics
        for packed in bin_.values()
    )
    assert held == packed_bytes(layers, len(bins.division))


def joined(bins, groups):
    schedule_firsts = [bins.division.stages[group[-1]].first for group in groups]
    from mosaicdiff.trajectory.schedule import NoiseSchedule

    schedule = NoiseSchedule.from_scheduler(linear_scheduler())
    return bins.merged(groups, Division.at_timesteps(schedule, schedule_firsts[:-1]))


def test_joined_bins_are_the_mean_by_their_steps(bins):
    count = len(bins.division)
    groups = [[0, 1, 2], list(range(3, count))]
    merged = joined(bins, groups)
    assert merged.steps == (sum(bins.steps[:3]), sum(bins.steps[3:]))
    for k, group in enumerate(groups):
        shares = [bins.steps[b] / sum(bins.steps[g] for g in group) for b in group]
        for reader in bins.statistics[0]:
            parts = [bins.statistics[b][reader].unpack(CPU) for b in group]
            found = merged.statistics[k][reader].unpack(CPU)
            for name in ("hessian", "mean"):
                pairs = zip(shares, parts, strict=True)
                wanted = sum(s * getattr(part, name).double() for s, part in pairs)
                error = (getattr(found, name).double() - wanted).abs().max()
                assert error <= 1e-6 * wanted.abs().max()
        name = bins.layers[0].readers[0].name
        wanted = sum(
            s * bins.weights["sensitivity"][b][name] for s, b in zip(shares, group, strict=True)
        )
        assert merged.weights["sensitivity"][k][name] == pytest.approx(wanted)
        name = bins.layers[0].name
        wanted = sum(s * bins.changes[b]["error"][name] for s, b in zip(shares, group, strict=True))
        assert merged.changes[k]["error"][name] == pytest.approx(wanted)


def test_a_bin_alone_and_all_bins_apart_stay_what_they_are(bins):
    count = len(bins.division)
    merged = joined(bins, [[0], list(range(1, count))])
    for reader, packed in bins.statistics[0].items():
        assert torch.equal(merged.statistics[0][reader].hessian, packed.hessian)
    same = joined(bins, [[k] for k in range(count)])
    assert same.statistics is bins.statistics and same.steps == bins.steps


def test_joining_twice_is_joining_once(bins):
    count = len(bins.division)
    once = joined(bins, [list(range(count))])
    twice = joined(joined(bins, [[0, 1], list(range(2, count))]), [[0, 1]])
    for reader in bins.statistics[0]:
        a, b = (m.statistics[0][reader].unpack(CPU).hessian for m in (once, twice))
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()


def test_pooling_is_joining_all(bins):
    one = joined(bins, [list(range(len(bins.division)))])
    for reader in bins.statistics[0]:
        pooled = bins.pooled(reader, CPU)
        assert torch.equal(pooled.hessian, one.statistics[0][reader].unpack(CPU).hessian)


def test_packing_keeps_mean_and_weight(bins):
    packed = next(iter(bins.statistics[0].values()))
    again = PackedStatistics.pack(packed.unpack(CPU))
    assert torch.equal(again.hessian, packed.hessian) and torch.equal(again.mean, packed.mean)
    assert again.weight == packed.weight > 0
