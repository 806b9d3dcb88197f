"""A report of a tiny model, made by the real engine."""

import copy
import json

import pytest

import mosaicdiff
from mosaicdiff.evaluate import compare
from mosaicdiff.evaluate.bench import bench_modes
from mosaicdiff.page import make_page, read_networks, render
from mosaicdiff.page.bench_file import bench_from_dict

from ..conftest import tiny_batches, tiny_denoiser, tiny_pipeline


def tiny_pair(**config):
    """A dense pipeline and the same pruned by 40% in three stages."""
    dense = tiny_pipeline(tiny_denoiser())
    pruned = tiny_pipeline(copy.deepcopy(dense.transformer))
    config = mosaicdiff.PruneConfig(
        **{"sparsity": 0.4, "samples": 48, "steps": 20, "weighting": "raw"} | config
    )
    mosaicdiff.prune(pruned, config, calibration=tiny_batches())
    return dense, pruned


@pytest.fixture(scope="session")
def pair():
    return tiny_pair()


@pytest.fixture(scope="session")
def evaluation(pair):
    return compare(*pair, num_images=14, steps=2, batch_size=14, guidance_scales=(1.0, 2.0))


@pytest.fixture(scope="session")
def timed(pair):
    """What `bench --json` prints of it."""
    dense, pruned = pair
    staged = pruned.transformer
    report = bench_modes("tiny", dense.transformer, staged, pruned.scheduler, repeats=1)
    return json.loads(json.dumps(report.to_dict()))


@pytest.fixture(scope="session")
def bench(timed):
    return bench_from_dict(timed)


@pytest.fixture(scope="session")
def page(pair, evaluation):
    networks = read_networks(pair[1], "tiny")
    return make_page("tiny", networks, evaluation, command="mosaicdiff report tiny")


@pytest.fixture(scope="session")
def html(page):
    return render(page)
