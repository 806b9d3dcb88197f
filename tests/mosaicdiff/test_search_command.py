"""The evolutionary allocation as a command: killed, resumed, bounded in time, refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mosaicdiff import PruneConfig

from .commands import kept_counts, refused, run_json

SEARCH = ("--allocation", "evolutionary", "--stages", 3, "--probe-samples", 4, "--steps", 6,
          "--generations", 3, "--population", 6, "--offspring", 6, "--sparsity", "40%")  # fmt: skip

#: The command, that ends by SIGKILL in the middle of writing its state for the n-th time.
KILLED = """
import os, signal, sys
from mosaicdiff.search import state
from mosaicdiff.cli import main
write, count = state.write_text, 0
def kill(path, text):
    global count
    count += 1
    if count == int(sys.argv[1]):
        path.with_name(path.name + ".partial").write_text(text[:-20])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, text)
state.write_text = kill
main(sys.argv[2:])
"""


def options(tiny, output, *more):
    small = ("--calibration", tiny.latents, "--samples", 32)
    return ("prune", tiny.folder, *small, *SEARCH, "--output", output, *more)


def found(report):
    """What a search must give again: all but the time it took."""
    search = report["decision"]["measured"]["search"]
    return kept_counts(report), {k: v for k, v in search.items() if k != "seconds"}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The report of a search that nothing interrupted, and the folder it wrote."""
    output = tmp_path_factory.mktemp("search") / "out"
    return run_json(*options(tiny, output)), output


def test_a_search_that_finds_nothing_gives_the_optimal_plan(tiny, tmp_path):
    first = options(tiny, tmp_path / "found", "--generations", 0, "--population", 1)
    found_report = run_json(*first)
    search = found_report["decision"]["measured"]["search"]
    assert search["best"] == search["start"] < search["history"][-1]  # levels are coarser
    second = options(tiny, tmp_path / "optimal", "--allocation", "optimal")
    assert kept_counts(found_report) == kept_counts(run_json(*second))


def test_a_search_is_no_worse_than_its_start_and_leaves_no_state(whole):
    report, output = whole
    search = report["decision"]["measured"]["search"]
    assert search["best"] <= search["start"] and search["complete"]
    assert search["generations"] == 3 and len(search["history"]) == 4
    assert search["history"] == sorted(search["history"], reverse=True)
    assert search["best"] <= search["history"][-1]
    assert 6 < search["evaluations"] <= 6 + 3 * 6
    assert report["sparsity"] == pytest.approx(0.4, rel=0.02)
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("at", [2, 6])
def test_a_killed_search_goes_on_as_if_it_had_not_been(tiny, whole, tmp_path, at):
    command = [str(part) for part in options(tiny, tmp_path / "out")]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(at), *command],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = tmp_path / "out.search.json"
    assert state.is_file() and not (tmp_path / "out").exists()
    report = run_json(*options(tiny, tmp_path / "out"))
    assert found(report) == found(whole[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_state_that_was_named_stays_and_serves_again(tiny, whole, tmp_path):
    state = tmp_path / "kept.json"
    first = run_json(*options(tiny, tmp_path / "first", "--search-state", state))
    written = state.read_text()
    again = run_json(*options(tiny, tmp_path / "again", "--search-state", state))
    assert found(first) == found(again) == found(whole[0])
    assert len(written) > 1000 and state.is_file()
    more = run_json(*options(tiny, tmp_path / "more", "--search-state", state, "--generations", 4))
    longer, shorter = (found(report)[1] for report in (more, first))
    assert longer["history"][:4] == shorter["history"] and longer["generations"] == 4


@pytest.mark.parametrize(
    "other",
    [("--sparsity", "30%"), ("--seed", 1), ("--search-genes", "layers"), ("--max-sparsity", 0.9),
     ("--probe-samples", 5), ("--offspring", 5)],
    ids=lambda options: options[0],
)  # fmt: skip
def test_a_state_of_other_settings_is_refused(tiny, state_file, tmp_path, other):
    refused("state must be of the same search",
            *options(tiny, tmp_path / "out", "--search-state", state_file), *other)  # fmt: skip


@pytest.fixture(scope="module")
def state_file(tiny, tmp_path_factory):
    place = tmp_path_factory.mktemp("state")
    run_json(*options(tiny, place / "out", "--search-state", place / "s.json", "--generations", 0))
    return place / "s.json"


def test_a_state_that_is_none_is_refused(tiny, tmp_path):
    (tmp_path / "text.json").write_text("{}")
    for state in (tmp_path / "text.json", tmp_path):
        refused("state must be a file that evolve wrote",
                *options(tiny, tmp_path / "out", "--search-state", state))  # fmt: skip


def test_the_time_given_ends_a_search(tiny, tmp_path):
    endless = ("--generations", 100_000, "--search-time", "1s")
    search = run_json(*options(tiny, tmp_path / "out", *endless))["decision"]["measured"]["search"]
    assert 0.5 < search["seconds"] < 6  # a batch begun is finished, on a busy machine too
    assert not search["complete"] and search["generations"] < 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "other, message",
    [
        (("--search-time", "soon"), "--search-time must be such as 90s, 10m or 2h"),
        (("--search-time", "0s"), "seconds must be more than 0"),
        (("--fitness", "beauty"), "fitness must be one of latent"),
        (("--search-start", "best"), "start must name some of optimal, score"),
        (("--offspring", 0), "offspring must be a whole number of at least 1"),
        (("--choice", "shared"), "genes must be layers with choice 'shared'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_searches_are_refused(tiny, tmp_path, other, message):
    refused(message, *options(tiny, tmp_path / "out"), *other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unit", ["params", "size", "latency", "quality"])
def test_a_budget_that_a_search_cannot_hold_is_refused(tiny, tmp_path, unit):
    text = "0.01" if unit == "quality" else "0.9x"
    command = [p for p in options(tiny, tmp_path / "out") if p not in ("--sparsity", "40%")]
    refused("must be a sparsity or macs", *command, f"--{unit}", text)
    with pytest.raises(ValueError, match="must be a sparsity or macs"):
        PruneConfig(allocation="evolutionary", **{unit: text})  # before any work


@pytest.mark.parametrize(
    "more",
    [("--search-genes", "layers"), ("--search-within", "uniform"), ("--fitness", "trajectory"),
     ("--fitness", "ssim"), ("--search-start", "score"),
     ("--granularity", "layers", "--sparsity", "37%")],
    ids=" ".join,
)  # fmt: skip
def test_every_kind_of_search_meets_the_budget(tiny, tmp_path, more):
    report = run_json(*options(tiny, tmp_path / "out", "--generations", 1), *more)
    search = report["decision"]["measured"]["search"]
    assert search["best"] <= search["start"] and search["evaluations"] > 6
    asked = 0.37 if "37%" in more else 0.4
    assert report["sparsity"] == pytest.approx(asked, rel=0.02)
