"""The drawings show what there is, no more and no less."""

import copy
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from mosaicdiff.page.bars import Bar, bar_chart
from mosaicdiff.page.collect import split_name
from mosaicdiff.page.curve import Axes, Band, Series, line_chart
from mosaicdiff.page.kept_map import describe_kept, kept_map
from mosaicdiff.page.layer_errors import has_errors, layer_errors
from mosaicdiff.page.svg import NARROW, WIDE, text_width

WIDTHS = (WIDE, NARROW)


def read(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def of_class(root, *names):
    return [node for node in root.iter() if set(names) <= set(node.get("class", "").split())]


def texts(root) -> list[str]:
    return ["".join(node.itertext()) for node in root.iter("text")]


def inside(root) -> None:
    """Every text lies within the drawing, as far as widths can be told without a browser."""
    width = float(root.get("viewBox").split()[2])
    offsets = {id(root): 0.0}
    for parent in root.iter():
        for child in parent:
            moved = re.match(r"translate\(([-\d.]+)", child.get("transform", ""))
            offsets[id(child)] = offsets[id(parent)] + (float(moved[1]) if moved else 0)
    for node in root.iter("text"):
        x, wide = float(node.get("x")) + offsets[id(node)], text_width("".join(node.itertext()))
        share = {"start": 0.0, "middle": 0.5, "end": 1.0}[node.get("text-anchor")]
        assert x - share * wide >= -2, (node.text, x)
        assert x + (1 - share) * wide <= width + 2, (node.text, x)


@pytest.mark.parametrize("width", WIDTHS)
def test_heads_that_are_gone_are_hollow(page, width):
    (network,) = page.networks
    root = read(kept_map(network, width))
    heads = [layer for layer in network.layers if layer.kind == "heads"]
    stages = range(len(network.stages))
    gone = sum(layer.groups - layer.kept[k] for layer in heads for k in stages)
    assert gone > 0
    neurons = (len(network.layers) - len(heads)) * len(stages)
    assert len(of_class(root, "removed")) == gone + neurons  # a frame for each bar of neurons
    for k, stage in enumerate(network.stages):
        kept = sum(layer.kept[k] for layer in heads)
        bars = len(network.layers) - len(heads)
        assert len(of_class(root, "kept", f"stage-{k}")) == kept + bars
        assert stage.name in texts(root)
    inside(root)
    titles = [node.text for node in root.iter("title")]
    first = network.layers[0]
    assert f"{first.name}: {first.kept[0]} of {first.groups} heads kept" in titles


def test_bars_are_as_long_as_their_share(page):
    (network,) = page.networks
    root = read(kept_map(network, WIDE))
    groups = [g for g in root.iter("g") if (t := g.find("title")) is not None and "neur" in t.text]
    assert groups
    for group in groups:
        frame, bar = group.findall("rect")
        kept, dense = map(int, re.findall(r"(\d+) of (\d+)", group.find("title").text)[0])
        assert float(bar.get("width")) / (float(frame.get("width")) + 1) == pytest.approx(
            kept / dense, abs=2e-3
        )
        assert str(kept) in texts(group)


def test_many_heads_become_a_bar(page):
    (network,) = page.networks
    layer = network.layers[0]
    many = replace(layer, groups=400, kept=(100,) * 3, indices=(frozenset(range(100)),) * 3)
    root = read(kept_map(replace(network, layers=(many,)), NARROW))
    assert len(of_class(root, "kept")) == 3


@pytest.mark.parametrize("groups", [16, 768, 13824])
def test_numbers_stand_beside_their_bars(page, groups):
    (network,) = page.networks
    layer = replace(network.layers[1], groups=groups, kept=(groups - 1,) * 3)
    root = read(kept_map(replace(network, layers=(layer,)), NARROW))
    (number,) = [n for n in root.iter("text") if n.text == str(groups - 1)][:1]
    frame = of_class(root, "removed")[0]
    left = float(number.get("x")) - text_width(number.text)
    assert float(frame.get("x")) + float(frame.get("width")) < left


def test_blocks_of_several_lists_stand_under_their_names(page):
    (network,) = page.networks
    names = ("transformer_blocks.0", "single_transformer_blocks.0", "mid_block")
    layers = tuple(
        replace(layer, block=block) for layer, block in zip(network.layers[:3], names, strict=True)
    )
    found = texts(read(kept_map(replace(network, layers=layers), WIDE)))
    assert {"transformer_blocks", "single_transformer_blocks", "mid_block"} <= set(found)
    one = texts(read(kept_map(network, WIDE)))
    assert "transformer_blocks" not in one  # said once, in the caption


def test_the_picture_is_said_in_words(page):
    (network,) = page.networks
    heads = [layer for layer in network.layers if layer.kind == "heads"]
    kept, dense = sum(x.kept[0] for x in heads), sum(x.groups for x in heads)
    assert f"early: {kept} of {dense} heads" in describe_kept(network)
    assert read(kept_map(network, WIDE)).get("aria-label") == describe_kept(network)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_error_has_a_point(page, width):
    (network,) = page.networks
    root = read(layer_errors(network, width))
    for k in range(len(network.stages)):
        known = [layer for layer in network.layers if layer.errors[k]]
        assert len(of_class(root, "mark", f"stage-{k}")) == len(known)
    inside(root)


def test_larger_errors_are_higher(page):
    (network,) = page.networks
    low, high = network.layers[0], copy.copy(network.layers[2])
    layers = (replace(low, errors=(1e-4,) * 3), replace(high, errors=(1e-2,) * 3))
    root = read(layer_errors(replace(network, layers=layers), WIDE))
    first, second = of_class(root, "mark", "stage-0")
    assert float(first.get("cy")) > float(second.get("cy"))


def test_no_errors_are_told_apart(page):
    (network,) = page.networks
    whole = tuple(replace(layer, errors=(0.0,) * 3) for layer in network.layers)
    assert has_errors(network) and not has_errors(replace(network, layers=whole))


@pytest.mark.parametrize("width", WIDTHS)
def test_curves_bands_and_levels(width):
    series = [Series("a", [1, 2, 3], [1.0, None, 3.0], "ink", 0)]
    bands = [Band("first", 1, 2, "stage-0"), Band("x" * 90, 2, 3, "stage-1")]
    axes = Axes("x axis", "y axis")
    root = read(line_chart(width, 200, "what it is", series, axes, bands, [("level", 2.0)]))
    assert root.get("aria-label") == "what it is" and root.get("role") == "img"
    assert len(of_class(root, "mark")) == 2 and len(of_class(root, "band")) == 2
    (line,) = of_class(root, "line")
    assert line.get("d").count("M") == 2  # parted where nothing is
    assert {"first", "level", "x axis", "y axis"} <= set(texts(root))
    assert "x" * 90 not in texts(root)  # does not fit
    inside(root)


@pytest.mark.parametrize("width", WIDTHS)
def test_bars_stand_in_proportion(width):
    bars = [Bar("half", 0.5, "2 MB", "1 MB"), Bar("more", 1.25, "4 s", "5 s")]
    root = read(bar_chart(bars, width))
    half, more = (float(rect.get("width")) for rect in of_class(root, "pruned"))
    assert half / more == pytest.approx(0.5 / 1.25, rel=1e-3)
    assert {"50%", "125%", "2 MB → 1 MB"} <= set(texts(root))
    inside(root)


def test_names_are_split_at_the_block():
    blocks = ("a.1", "a.10", "b")
    assert split_name("a.10.attn.to_q", blocks) == ("a.10", "attn.to_q")
    assert split_name("b.net.0.proj", blocks) == ("b", "net.0.proj")
    assert split_name("else.where", blocks) == ("else", "where")
