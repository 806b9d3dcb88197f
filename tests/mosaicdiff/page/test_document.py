"""The whole page: complete, self-contained, and safe whatever values say."""

import base64
import hashlib
import re
from dataclasses import replace

import pytest

from mosaicdiff.page import make_page, render, write_page
from mosaicdiff.page.tables import data_table

from .test_markup import Reader

EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


def test_nothing_is_loaded_from_outside(html):
    for tag, attributes in Reader(html).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), value
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    style = re.search(r"<style>(.*?)</style>", html, re.S)[1]
    assert "url(" not in style and "@import" not in style


def test_the_policy_allows_this_style_and_this_script_only(html):
    tags = Reader(html).tags
    policy = next(a["content"] for _, a in tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        assert len(found) == 1
        digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_values_never_become_markup(page, bench):
    row = page.evaluation.setting
    setting = replace(
        row,
        models={"dense": EVIL, "pruned": EVIL},
        conditions=(EVIL,) * len(row.conditions),
        condition_kind="prompt",
        options={EVIL: EVIL},
        device=EVIL,
        versions={EVIL: EVIL},
        reference=EVIL,
        network=EVIL,
    )
    evaluation = replace(page.evaluation, setting=setting, notes=(EVIL,))
    (network,) = page.networks
    layers = tuple(replace(x, name=EVIL, part=EVIL, block=EVIL + ".1") for x in network.layers)
    stages = tuple(replace(stage, name=EVIL) for stage in network.stages)
    spoilt = replace(
        network, component=EVIL, kind=EVIL, layers=layers, stages=stages, config={EVIL: EVIL}
    )
    rows = tuple(replace(row, mode=EVIL) for row in bench.rows)
    bench = replace(bench, model=EVIL, machine={EVIL: EVIL}, rows=rows)
    evil = render(make_page(EVIL, [spoilt, spoilt], evaluation, command=EVIL, bench=bench))
    tags = [tag for tag, _ in Reader(evil).tags]
    assert tags.count("script") == 1 and tags.count("img") == len(page.sheets)
    assert "alert(1)" in evil and "<script>alert" not in evil and "<img src=x" not in evil
    assert evil.count(EVIL) == 0


def test_it_says_what_was_measured(page, html):
    text = Reader(html).text
    evaluation = page.evaluation
    for metric in evaluation.metrics:
        assert metric.title[1:] in text
    for name, version in evaluation.setting.versions.items():
        assert name in text and version in text
    for layer in page.networks[0].layers:
        assert layer.name in text
    for section in ("Pictures", "Quality", "Cost", "Stages", "What is kept", "Error per layer"):
        assert section in text
    assert "mosaicdiff report tiny" in text
    dense, pruned = evaluation.pairs[0]
    ratio = evaluation.ratio(dense, pruned)
    assert f"{ratio.speedup:.2f}×" in text and f"{ratio.macs_with_attention:.2f}×" in text


def test_every_figure_has_words(html):
    tags = Reader(html).tags
    drawings = [a for tag, a in tags if tag == "svg"]
    assert len(drawings) >= 8 and all(len(a["aria-label"]) > 30 for a in drawings)
    assert sum(a["class"] == "wide" for a in drawings) * 2 == len(drawings)
    assert all(len(a["alt"]) > 20 for tag, a in tags if tag == "img")


def test_links_lead_to_sections(html):
    tags = Reader(html).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"][1:] for tag, a in tags if tag == "a"]
    assert links == [a["id"] for tag, a in tags if tag == "section"]


def test_one_guidance_has_no_curve_and_no_choice(page):
    evaluation = page.evaluation
    one = replace(
        evaluation,
        rows=evaluation.rows[:2],
        setting=replace(evaluation.setting, guidance_scales=(1.0,)),
    )
    html = render(make_page("tiny", page.networks, one))
    tags = [tag for tag, _ in Reader(html).tags]
    assert "select" not in tags and "Bold is the best" not in html
    assert "It was written from Python" in html


def test_a_guidance_of_the_pipeline_has_no_number(page):
    evaluation = page.evaluation
    rows = tuple(replace(row, guidance_scale=None) for row in evaluation.rows[:2])
    images = {(row.model, None): evaluation.images[row.model, 1.0] for row in rows}
    own = replace(
        evaluation,
        rows=rows,
        images=images,
        setting=replace(evaluation.setting, guidance_scales=(None,), steps=None),
    )
    text = Reader(render(make_page("tiny", page.networks, own))).text
    assert "as usual" in text


def test_two_networks_have_sections_of_their_own(page):
    (network,) = page.networks
    other = replace(network, component="transformer_2")
    text = Reader(render(make_page("tiny", [network, other], page.evaluation))).text
    assert "Stages of transformer_2" in text and "What is kept of transformer" in text


def test_a_benchmark_is_shown(page, bench):
    html = render(make_page("tiny", page.networks, page.evaluation, bench=bench))
    text = Reader(html).text
    row = bench.rows[1]
    assert row.network == "pruned" and f"{row.efficiency:.3f}" in text
    for value in ("Speed of the denoiser", "eager", f"{row.milliseconds:,.2f} ms", "launches"):
        assert value in text
    drawings = re.findall(r"<svg.*?</svg>", html, re.S)
    (wide,) = [d for d in drawings if "Where the time" in d and 'class="wide"' in d]
    rects = re.findall(r'<rect[^>]* width="([\d.]+)"[^>]*class="(part-\d)"', wide)
    assert len(rects) == 5 * len(bench.spent)
    longest = max(sum(float(w) for w, _ in rects[k : k + 5]) for k in range(0, len(rects), 5))
    assert longest == pytest.approx(860 - 130 - 76, abs=0.1)


def test_it_is_written_whole(page, tmp_path):
    size = write_page(page, tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").stat().st_size == size
    said = re.search(r"This file takes ([\d.]+) (\w+)", (tmp_path / "report.html").read_text())
    assert float(said[1]) * {"kB": 1e3, "MB": 1e6}[said[2]] == pytest.approx(size, rel=0.05)


def test_a_table_has_as_many_cells_as_columns():
    with pytest.raises(ValueError, match="rows must have 2 cells, as many as columns, got 1"):
        data_table("caption", ["a", "b"], [["x"]])
