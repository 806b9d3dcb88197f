"""`mosaicdiff calibrate`, and prunings from its file."""

import pytest

from .commands import kept_counts, refused, run, run_json, stored


@pytest.fixture(scope="module")
def bins(tiny, tmp_path_factory):
    """The tiny model calibrated in bins: the file, and what the command said."""
    path = tmp_path_factory.mktemp("bins") / "bins.cal"
    values = run_json("calibrate", *tiny.options, "--output", path, "--stages", "auto", "--bins", 4)
    return path, values


def test_a_dry_run_states_the_size_and_writes_nothing(tiny, bins, tmp_path):
    options = ("calibrate", *tiny.options, "--output", tmp_path / "new.cal", "--stages", "auto",
               "--bins", 4, "--dry-run")  # fmt: skip
    values = run_json(*options)
    path, written = bins
    assert values["stated_bytes"] == pytest.approx(path.stat().st_size, rel=0.05)
    assert written["bytes"] == path.stat().st_size and "bytes" not in values
    assert values["bins"] == written["bins"]
    shown = run(*options).output
    assert f"{len(values['bins'])} stages or bins of 6 layers: about" in shown
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept_unless_overwrite_says_otherwise(tiny, tmp_path):
    file, folder = tmp_path / "old.cal", tmp_path / "folder"
    file.write_text("precious")
    folder.mkdir()
    for options, message in (
        (("--output", file), "Pass --overwrite"),
        (("--output", folder), "is a folder"),
        (("--output", folder, "--overwrite"), "is a folder"),
    ):
        result = run("calibrate", *tiny.options, *options)
        assert result.exit_code == 2 and message in result.stderr
    assert file.read_text() == "precious" and list(folder.iterdir()) == []
    values = run_json("calibrate", *tiny.options, "--output", file, "--overwrite")
    assert file.stat().st_size == values["bytes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "old.cal"]


def test_a_place_that_cannot_be_is_refused_before_work(tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    result = run("calibrate", *tiny.options, "--output", tmp_path / "file" / "new.cal")
    assert result.exit_code == 2, (result.output, result.exception)
    assert "must lie in a folder" in result.stderr


def test_bins_serve_the_stages_of_the_closed_form(tiny, bins, tmp_path):
    options = (*tiny.options, "--sparsity", "40%", "--allocation", "optimal")
    loaded = run_json("prune", *options, "--from", bins[0], "--output", tmp_path / "loaded")
    direct = run_json("prune", *options, "--output", tmp_path / "direct")
    for name in ("name", "first_timestep", "last_timestep", "steps"):
        assert [s[name] for s in loaded["stages"]] == [s[name] for s in direct["stages"]]
    assert loaded["sparsity"] == pytest.approx(0.4, rel=0.02)


def test_bins_serve_stages_from_the_data(tiny, bins, tmp_path):
    path, values = bins
    options = (*tiny.options, "--stages", "auto", "--bins", 4, "--allocation", "optimal",
               "--max-stages", 3, "--sparsity", "40%")  # fmt: skip
    loaded = run_json("prune", *options, "--from", path, "--output", tmp_path / "loaded")
    firsts = [stage["first_timestep"] for stage in loaded["stages"]]
    assert 1 <= len(firsts) <= 3 and set(firsts) <= set(values["bins"]) and firsts[-1] == 0
    assert sum(stage["steps"] for stage in loaded["stages"]) == 20
    direct = run_json("prune", *options, "--output", tmp_path / "direct")
    assert kept_counts(loaded) == kept_counts(direct)
    first, second = stored(tmp_path / "loaded"), stored(tmp_path / "direct")
    assert first.keys() == second.keys() and all((first[k] == second[k]).all() for k in first)


def test_bins_serve_stages_that_the_user_names(tiny, bins, tmp_path):
    path, values = bins
    inner = values["bins"][1]
    options = (*tiny.options, "--from", path)
    report = run_json("prune", *options, "--stages", inner, "--output", tmp_path / "named")
    assert [stage["first_timestep"] for stage in report["stages"]] == [inner, 0]
    whole = run_json("prune", *options, "--stages", 1, "--output", tmp_path / "one")
    assert [stage["name"] for stage in whole["stages"]] == ["all"]
    had = ",".join(str(first) for first in sorted(values["bins"])[1:])
    refused(
        f"parted at timesteps where it was ({had}), but {inner + 1} is asked for",
        "prune", *options, "--stages", inner + 1, "--output", tmp_path / "refused",
    )  # fmt: skip


def test_the_file_prunes_without_the_latents(tiny, tiny_file, tmp_path):
    options = (tiny.folder, "--from", tiny_file, "--steps", 20)
    report = run_json("prune", *options, "--output", tmp_path / "out", "--sparsity", "40%")
    assert report["sparsity"] == pytest.approx(0.4, abs=0.005)
    refused(
        "calibration must be given for a quality budget",
        "prune", *options, "--output", tmp_path / "refused", "--quality", "0.01",
    )  # fmt: skip
    refused("could not be read", "prune", *options[:1], "--from", tiny.latents,
            "--output", tmp_path / "refused")  # fmt: skip
    refused("but there is none", "prune", *options[:1], "--from", tmp_path / "nowhere.cal",
            "--output", tmp_path / "refused")  # fmt: skip


def test_a_dry_run_from_the_file_is_the_plan_that_prune_makes(tiny, tiny_file, tmp_path):
    options = (*tiny.options, "--from", tiny_file, "--allocation", "optimal", "--params", "0.9x",
               "--output", tmp_path / "out")  # fmt: skip
    planned = run_json("prune", *options, "--dry-run")
    assert not (tmp_path / "out").exists()
    report = run_json("prune", *options)
    dense = {row["name"]: row["groups"] for row in report["stages"][0]["layers"]}
    assert kept_counts(report) == [
        {name: dense[name] - gone for name, gone in stage["removed"].items()}
        for stage in planned["stages"]
    ]


def test_the_embedded_model_is_calibrated_and_pruned(tmp_path):
    small = ("--samples", 8, "--steps", 6, "--stages", 1)
    values = run_json("calibrate", "digits", *small, "--output", tmp_path / "digits.cal")
    assert values["bytes"] == pytest.approx(values["stated_bytes"], rel=0.01)
    options = ("digits", *small, "--from", tmp_path / "digits.cal", "--macs", "0.7x")
    report = run_json("prune", *options, "--output", tmp_path / "out", "--allocation", "optimal")
    ratio = report["macs_with_attention"] / report["macs_dense_with_attention"]
    assert ratio == pytest.approx(0.7, rel=0.02)
