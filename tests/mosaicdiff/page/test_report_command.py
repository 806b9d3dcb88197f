"""`mosaicdiff report`: the page it writes, and what it refuses before it begins."""

import json

import pytest

from ..commands import refused, run, run_json
from .conftest import tiny_pair
from .test_markup import Reader

QUICK = ("--num-images", 6, "--steps", 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model and the same pruned, on disk."""
    place = tmp_path_factory.mktemp("report")
    dense, pruned = tiny_pair()
    dense.save_pretrained(place / "dense")
    pruned.save_pretrained(place / "pruned")
    return place / "pruned", place / "dense"


def test_a_page_is_written(folders, timed, tmp_path):
    pruned, dense = folders
    (tmp_path / "bench.json").write_text(json.dumps(timed))
    output = tmp_path / "report.html"
    values = run_json(
        "report", pruned, "--output", output, "--against", dense, *QUICK,
        "--guidance-scale", "1,2", "--bench", tmp_path / "bench.json", "--pictures", 4,
    )  # fmt: skip
    assert values["output"] == str(output) and values["bytes"] == output.stat().st_size
    read = Reader(output.read_text())
    assert sum(tag == "img" for tag, _ in read.tags) == 4  # two models, two scales
    assert f"mosaicdiff report {pruned} --output {output}" in read.text
    assert "--guidance-scale 1,2" in read.text and "Efficiency" in read.text
    assert len(values["rows"]) == 4
    told = run("report", pruned, "--output", output, "--against", dense, *QUICK).output
    assert f"wrote {output}" in told and "kB" in told


def test_what_is_wrong_is_refused_first(folders, tmp_path):
    pruned, dense = folders
    page = tmp_path / "report.html"
    refused("--output must end in .html, got", "report", pruned, "--output", tmp_path / "a.pdf")
    nowhere = tmp_path / "none" / "a.html"
    refused("--output must lie in a folder that exists", "report", pruned, "--output", nowhere)
    (tmp_path / "folder.html").mkdir()
    result = run("report", pruned, "--output", tmp_path / "folder.html")
    assert result.exit_code == 2 and "must be a file, but" in result.stderr
    refused("--pictures must be at least 1", "report", pruned, "--output", page, "--pictures", 0)
    refused(
        "model must be pruned, but", "report", dense, "--output", page, "--against", dense, *QUICK
    )


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "--bench must be a file, but there is none"),
        ("{", "--bench must be JSON"),
        ("[1]", "--bench must hold what `mosaicdiff bench --json` prints"),
        ('{"error": "no"}', "where this is missing or odd: 'device'"),
    ],
)
def test_a_bad_benchmark_is_refused(tmp_path, text, message):
    bench = tmp_path / "bench.json"
    if text is not None:
        bench.write_text(text)
    refused(message, "report", "digits", "--output", tmp_path / "a.html", "--bench", bench)
