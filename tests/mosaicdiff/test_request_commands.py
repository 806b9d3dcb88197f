"""What the options of a request promise, looked up in the report and in the checkpoint."""

import pytest

from mosaicdiff.cli import main

from .commands import kept_counts, refused, run, run_json, stored

OPTIMAL = ("--allocation", "optimal", "--sparsity", "40%")
HEADS, NEURONS = 4, 128


@pytest.mark.parametrize("command", sorted(main.commands))
def test_help_shows_an_example_and_json(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    examples = result.output.split("Examples:")[1]
    assert f"mosaicdiff {command}" in examples and "--json" in result.output


def prune(tiny, output, *options):
    return run_json("prune", *tiny.options, "--output", output, *options)


def by_kind(report, kind):
    return [
        row["kept"] for stage in report["stages"] for row in stage["layers"] if row["kind"] == kind
    ]


@pytest.mark.parametrize("allocation", ["optimal", "score"])
def test_layers_that_are_kept_stay_whole(tiny, tiny_file, tmp_path, allocation):
    report = prune(
        tiny, tmp_path / "out", "--from", tiny_file, "--allocation", allocation,
        "--sparsity", "40%", "--exclude", "transformer_blocks.0", "--exclude", "*.2.attn1",
    )  # fmt: skip
    whole = {"transformer_blocks.0.attn1", "transformer_blocks.0.ff", "transformer_blocks.2.attn1"}
    for counts in kept_counts(report):
        dense = {name for name, kept in counts.items() if kept in (HEADS, NEURONS)}
        assert whole <= dense
    assert report["sparsity"] == pytest.approx(0.4, rel=0.02)
    refused(
        "nothing matches 'blocks.9'", "prune", *tiny.options, "--exclude", "blocks.9",
        "--output", tmp_path / "refused",
    )  # fmt: skip


@pytest.mark.parametrize("allocation", ["optimal", "score"])
def test_every_layer_keeps_the_least(tiny, tiny_file, tmp_path, allocation):
    options = ("--from", tiny_file, "--allocation", allocation, "--sparsity", "45%")
    free = prune(tiny, tmp_path / "free", *options)
    report = prune(tiny, tmp_path / "out", *options, "--least-heads", 2, "--least-neurons", 60)
    assert min(by_kind(report, "heads")) == 2 and min(by_kind(report, "neurons")) >= 60
    assert min(by_kind(free, "heads")) < 2 or min(by_kind(free, "neurons")) < 60
    assert report["sparsity"] == pytest.approx(0.45, rel=0.02)
    refused("sparsity must be at most", "prune", *tiny.options, "--sparsity", "45%",
            "--allocation", allocation, "--least-heads", 4, "--least-neurons", 100,
            "--output", tmp_path / "refused")  # fmt: skip
    refused("least_heads must be at most 4", "prune", *tiny.options, "--least-heads", 5,
            "--output", tmp_path / "refused")  # fmt: skip


@pytest.mark.parametrize("rank", ["curve", "error", "cosine"])
def test_blocks_go_whole(tiny, tmp_path, rank):
    report = prune(
        tiny, tmp_path / "out", "--allocation", "optimal", "--granularity", "blocks",
        "--depth-rank", rank, "--stages", 2, "--sparsity", "33.33%",
    )  # fmt: skip
    for counts in kept_counts(report):
        for block in range(3):
            pair = tuple(counts[f"transformer_blocks.{block}.{part}"] for part in ("attn1", "ff"))
            assert pair in ((0, 0), (HEADS, NEURONS))
    assert report["sparsity"] == pytest.approx(1 / 3, rel=0.02)


def test_layers_go_whole(tiny, tmp_path):
    report = prune(
        tiny, tmp_path / "out", "--allocation", "optimal", "--granularity", "layers",
        "--stages", 2, "--sparsity", "33.33%",
    )  # fmt: skip
    assert set(by_kind(report, "heads")) <= {0, HEADS}
    assert set(by_kind(report, "neurons")) <= {0, NEURONS}
    assert report["sparsity"] == pytest.approx(1 / 3, rel=0.02)
    refused("allocation must be optimal or evolutionary with granularity 'layers'",
            "prune", *tiny.options, "--granularity", "layers", "--allocation", "score",
            "--output", tmp_path / "refused")  # fmt: skip


def kept_sets(tensors, report):
    """Groups kept of each layer, one set a stage."""
    names = [row["name"] for row in report["stages"][0]["layers"]]
    dense = {row["name"]: row["groups"] for row in report["stages"][0]["layers"]}
    return {
        name: [
            set(tensors[f"kept.{k}.{name}"].tolist())
            if f"kept.{k}.{name}" in tensors
            else set(range(dense[name]))
            for k in range(len(report["stages"]))
        ]
        for name in names
    }


def is_nested(sets):
    ordered = sorted(sets, key=len)
    return all(small <= large for small, large in zip(ordered, ordered[1:], strict=False))


@pytest.mark.parametrize("allocation", ["optimal", "score"])
def test_nested_choices_are_parts_of_one_another(tiny, tiny_file, tmp_path, allocation):
    options = ("--from", tiny_file, "--allocation", allocation, "--sparsity", "40%",
               "--weighting", "raw")  # fmt: skip
    free = prune(tiny, tmp_path / "separate", *options)
    nested = prune(tiny, tmp_path / "nested", *options, "--choice", "nested")
    sets = kept_sets(stored(tmp_path / "nested"), nested)
    assert all(is_nested(stages) for stages in sets.values())
    apart = kept_sets(stored(tmp_path / "separate"), free)
    assert not all(is_nested(stages) for stages in apart.values())
    assert nested["bytes"] < free["bytes"] or allocation == "score"  # it leaves a stage whole


@pytest.mark.parametrize("allocation", ["optimal", "uniform"])
def test_shared_choices_are_the_same_in_all_stages(tiny, tiny_file, tmp_path, allocation):
    options = ("--from", tiny_file, "--allocation", allocation, "--sparsity", "40%")
    report = prune(tiny, tmp_path / "out", *options, "--choice", "shared")
    sets = kept_sets(stored(tmp_path / "out"), report)
    assert all(stages[0] == stages[1] == stages[2] for stages in sets.values())
    assert any(len(stages[0]) < 128 for name, stages in sets.items() if name.endswith("ff"))
    weight = [stored(tmp_path / "out")[f"stage.{k}.{'transformer_blocks.1.ff.net.2'}.weight"]
              for k in range(2)]  # fmt: skip
    assert weight[0].shape == weight[1].shape and not (weight[0] == weight[1]).all()


def test_what_an_option_needs_can_be_calibrated(tiny, tmp_path):
    options = ("--granularity", "blocks", "--depth-rank", "error", "--choice", "shared")
    file = tmp_path / "blocks.cal"
    run_json("calibrate", *tiny.options, *options, "--output", file)
    loaded, direct = (
        prune(tiny, tmp_path / name, *more, "--allocation", "optimal", *options,
              "--sparsity", "33.33%")
        for name, more in (("loaded", ("--from", file)), ("direct", ()))
    )  # fmt: skip
    assert kept_counts(loaded) == kept_counts(direct)


def test_shared_choices_need_shares_that_are_the_same(tiny, tmp_path):
    for allocation in ("score", "0.5,0.1,0.4"):
        refused("allocation must be uniform, optimal or evolutionary with choice 'shared'",
                "prune", *tiny.options, "--choice", "shared", "--allocation", allocation,
                "--output", tmp_path / "refused")  # fmt: skip


def test_weightings_move_what_goes(tiny, tmp_path):
    plans = []
    for weighting in ("raw", "sensitivity", "trajectory"):
        report = prune(tiny, tmp_path / weighting, *OPTIMAL, "--weighting", weighting,
                       "--probe-samples", 4)  # fmt: skip
        assert report["config"]["weighting"] == weighting
        assert report["sparsity"] == pytest.approx(0.4, rel=0.02)
        assert report["decision"]["predicted_error"] > 0
        plans.append(kept_counts(report))
    assert plans[0] != plans[1] != plans[2] != plans[0]


def test_stages_from_the_data_lose_no_more_than_one(tiny, tmp_path):
    auto = prune(tiny, tmp_path / "auto", *OPTIMAL, "--stages", "auto", "--bins", 4)
    stages = auto["stages"]
    assert 1 <= len(stages) <= 4 and stages[0]["last_timestep"] == 999
    assert stages[-1]["first_timestep"] == 0
    for above, below in zip(stages, stages[1:], strict=False):
        assert above["first_timestep"] == below["last_timestep"] + 1
    assert sum(stage["steps"] for stage in stages) == 20
    one = prune(tiny, tmp_path / "one", *OPTIMAL, "--stages", "auto", "--bins", 4,
                "--max-stages", 1)  # fmt: skip
    assert len(one["stages"]) == 1
    if len(stages) > 1:  # each further stage took a tenth off
        errors = [report["decision"]["predicted_error"] for report in (auto, one)]
        assert errors[0] < 0.9 * errors[1]
