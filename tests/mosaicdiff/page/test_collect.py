"""What a page says of a network is what the checkpoint says."""

import pytest

from mosaicdiff.config import PruneConfig
from mosaicdiff.page import make_page, read_networks, render
from mosaicdiff.page.collect import read_network
from mosaicdiff.pipeline import cut

from ..conftest import linear_scheduler, tiny_pipeline
from .conftest import tiny_denoiser, tiny_pair
from .test_markup import Reader


def test_layers_and_stages_are_those_of_the_report(pair):
    (network,) = read_networks(pair[1], "tiny")
    info = pair[1].transformer.info
    report = info.report
    assert [stage.name for stage in network.stages] == [s["name"] for s in report["stages"]]
    assert [(s.first, s.last) for s in network.stages] == [
        (s.first + 1, s.last + 1) for s in info.division.stages
    ]
    for k, stage in enumerate(report["stages"]):
        assert network.stages[k].sparsity == stage["sparsity"]
        for layer, row in zip(network.layers, stage["layers"], strict=True):
            assert (layer.name, layer.kept[k], layer.errors[k]) == (
                row["name"], row["kept"], row["error"]
            )  # fmt: skip
            kept = info.kept[k].get(layer.name)
            assert layer.indices[k] == (None if kept is None else set(kept.tolist()))
    assert {layer.block for layer in network.layers} == {
        f"transformer_blocks.{k}" for k in range(3)
    }


def test_the_threshold_is_where_the_middle_stage_begins(pair):
    (network,) = read_networks(pair[1], "tiny")
    curve, middle = network.curve, network.stages[1]
    for t, score in zip(curve.timesteps, curve.score, strict=True):
        assert (score >= curve.threshold) == (middle.first <= t <= middle.last)
    assert len(curve.timesteps) == len(curve.score) == len(curve.gain) <= 240


def described(**config):
    """A network that was cut and not calibrated: where its stages lie is all that matters."""
    scheduler = linear_scheduler()
    asked = PruneConfig(**{"sparsity": 0.4, "steps": 20, "allocation": "score"} | config)
    return read_network("unet", cut(tiny_denoiser(), asked, scheduler=scheduler), scheduler)


def test_stages_that_the_score_did_not_make_have_no_threshold():
    even = described(stages=2)
    assert even.curve.threshold is None and "evenly into 2" in even.curve.origin
    given = described(boundaries=(500,))
    assert given.curve.threshold is None and given.curve.origin == "The boundaries were given."
    one = described(stages=1)
    assert one.curve.threshold is None and "one stage" in one.curve.origin
    assert described().curve.threshold is not None


def test_single_weights(evaluation):
    _, pruned = tiny_pair(granularity="unstructured")
    networks = read_networks(pruned, "tiny")
    (network,) = networks
    report = pruned.transformer.info.report["stages"][0]["weights"]
    assert network.of_weights and len(network.layers) == len(report)
    for layer, row in zip(network.layers, report, strict=True):
        assert layer.kept[0] / layer.groups == pytest.approx(1 - row["removed"])
        assert layer.block.startswith("transformer_blocks.") and "." not in layer.block[19:]
    text = Reader(render(make_page("tiny", networks, evaluation))).text
    assert "share of its weights that each linear keeps" in text


def test_without_a_report_it_says_so(pair, evaluation):
    staged = pair[1].transformer
    kept, staged.info.report = staged.info.report, {}
    try:
        network = read_network("transformer", staged, pair[1].scheduler)
    finally:
        staged.info.report = kept
    assert network.report is None and {e for x in network.layers for e in x.errors} == {None}
    text = Reader(render(make_page("tiny", [network], evaluation))).text
    assert "The checkpoint holds no report" in text and "Parameters stored" in text


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="model must be pruned, but tiny is dense. Prune it first"):
        read_networks(tiny_pipeline(tiny_denoiser()), "tiny")
