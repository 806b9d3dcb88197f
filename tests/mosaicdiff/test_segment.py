"""Stages from the data: the cheapest partition of the bins."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mosaicdiff import PruneConfig
from mosaicdiff.allocation.decide import make_allocator
from mosaicdiff.allocation.planning import make_frame
from mosaicdiff.pipeline import calibrate, prune
from mosaicdiff.request import prepare
from mosaicdiff.trajectory.segment import best_partitions, stages_from_data
from mosaicdiff.trajectory.stages import Division

from .conftest import linear_scheduler, tiny_batches, tiny_denoiser

SMALL = {"samples": 32, "steps": 20, "allocation": "optimal", "sparsity": 0.4}
AUTO = {"stages": "auto", "bins": 6}


def silent(what, done, total):
    pass


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_no_partition_is_cheaper(bins, most, seed):
    most = min(most, bins)
    costs = np.random.default_rng(seed).normal(size=(bins + 1, bins + 1))
    asked = []

    def cost(i, j):
        asked.append((i, j))
        return float(costs[i, j])

    found = best_partitions(bins, most, cost)
    assert len(asked) == len(set(asked)) == bins * (bins + 1) // 2
    for count, (firsts, total) in enumerate(found, start=1):
        options = {}
        for inner in itertools.combinations(range(1, bins), count - 1):
            edges = [0, *inner, bins]
            options[tuple(edges[:-1])] = sum(costs[i, j] for i, j in itertools.pairwise(edges))
        assert len(firsts) == count
        assert total == pytest.approx(min(options.values()))
        assert options[firsts] == pytest.approx(total)


@pytest.fixture(scope="module")
def bins():
    return calibrate(
        tiny_denoiser(), PruneConfig(**SMALL, **AUTO), scheduler=linear_scheduler(),
        calibration=tiny_batches(),
    )  # fmt: skip


def test_joined_bins_have_the_mean_hessian(bins):
    reader = bins.layers[1].readers[0].name
    parts = [row[reader].unpack(torch.device("cpu")) for row in bins.statistics]
    steps = bins.steps
    schedule = make_frame(linear_scheduler(), PruneConfig(steps=20)).schedule
    starts = [bins.division.stages[2].first]
    division = Division.at_timesteps(schedule, starts)
    count = len(parts)
    joined = bins.merged([[0, 1, 2], list(range(3, count))], division)
    assert joined.steps == (sum(steps[:3]), sum(steps[3:]))
    for stage, members in enumerate([range(3), range(3, count)]):
        got = joined.statistics[stage][reader].unpack(torch.device("cpu"))
        total = sum(steps[k] for k in members)
        hessian = sum(steps[k] * parts[k].hessian.double() for k in members) / total
        mean = sum(steps[k] * parts[k].mean.double() for k in members) / total
        torch.testing.assert_close(got.hessian.double(), hessian, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got.mean.double(), mean, rtol=1e-5, atol=1e-7)
    pooled = bins.pooled(reader, torch.device("cpu"))
    hessian = sum(n * p.hessian.double() for n, p in zip(steps, parts, strict=True)) / sum(steps)
    torch.testing.assert_close(pooled.hessian.double(), hessian, rtol=1e-5, atol=1e-7)


def request(measured, **config):
    return prepare(
        tiny_denoiser(), PruneConfig(**(SMALL | config)), linear_scheduler(), tiny_batches(),
        measured,
    )  # fmt: skip


def test_stages_from_the_data_lose_no_more_than_those_of_the_closed_form(bins):
    formed, _ = make_allocator(request(bins), bins, silent)
    assert len(formed.frame.division) == 3
    known = formed.error(formed.meet(formed.config.budget))
    partitions = stages_from_data(request(bins, **AUTO), bins, silent)
    assert [len(p.firsts) for p in partitions] == [1, 2, 3, 4]
    assert partitions[2].error <= known * (1 + 1e-6)
    # More stages may keep what fewer do.
    errors = [p.error for p in partitions]
    assert errors == sorted(errors, reverse=True)
    one, _ = make_allocator(request(bins, stages="auto", bins=6, max_stages=1), bins, silent)
    assert len(one.frame.division) == 1
    alone = one.error(one.meet(one.config.budget))
    # The plan may end a group short of the target.
    assert alone == pytest.approx(partitions[0].error, rel=0.02)


def test_stages_that_gain_too_little_are_left_out(bins, monkeypatch):
    counts = []
    for gain in (1.0, 0.0):
        monkeypatch.setattr("mosaicdiff.trajectory.segment.GAIN", gain)
        allocator, _ = make_allocator(request(bins, **AUTO), bins, silent)
        counts.append(len(allocator.frame.division))
    assert counts == [1, 4]


def test_the_whole_job_with_stages_from_the_data(bins):
    config = PruneConfig(**SMALL, **AUTO)
    report = prune(
        tiny_denoiser(), config, scheduler=linear_scheduler(), measured=bins
    ).report  # fmt: skip
    assert 1 <= len(report.stages) <= 4
    assert sum(stage.steps for stage in report.stages) == 20
    assert report.sparsity == pytest.approx(0.4, abs=0.005)


def test_layers_left_whole_have_no_say_in_the_stages(bins):
    """Stages that suit only what is kept whole are no gain: the partition must not follow it."""
    keep = ("transformer_blocks.0.*", "transformer_blocks.2.*")
    job = request(bins, **AUTO, exclude=keep, sparsity=0.2)
    plain = stages_from_data(job, bins, silent)
    # Make what is kept whole look as if it changed greatly from bin to bin.
    statistics = []
    for k, row in enumerate(bins.statistics):
        scaled = dict(row)
        for layer in bins.layers:
            if layer.block != "transformer_blocks.1":
                part = row[layer.readers[0].name]
                louder = part.hessian * 10.0 ** (k % 2 * 4)
                scaled[layer.readers[0].name] = replace(part, hessian=louder)
        statistics.append(scaled)
    loud = stages_from_data(job, replace(bins, statistics=statistics), silent)
    assert [p.firsts for p in loud] == [p.firsts for p in plain]
