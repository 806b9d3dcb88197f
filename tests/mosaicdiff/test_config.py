import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicdiff.config import PruneConfig
from mosaicdiff.config_checks import ALLOCATIONS, COMPENSATIONS, CRITERIA

SHARES = st.floats(0, 1)


@given(
    st.builds(
        PruneConfig,
        sparsity=st.floats(0, 0.99),
        allocation=st.sampled_from(ALLOCATIONS[:2]),
        criterion=st.sampled_from([name for name in CRITERIA if name != "dsnot"]),
        compensation=st.sampled_from(COMPENSATIONS),
        boundaries=st.none() | st.lists(st.integers(1, 999), min_size=1, max_size=4, unique=True),
        seed=st.integers(0, 10**9),
        null_share=SHARES,
    )
    | st.builds(
        PruneConfig,
        allocation=st.just("explicit"),
        stage_sparsity=st.lists(SHARES, min_size=1, max_size=4),
        layer_sparsity=st.dictionaries(st.text(), st.lists(SHARES, min_size=1, max_size=3)),
    )
)
def test_round_trip_through_json(config):
    assert PruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1\.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": float("nan")}, "sparsity must be such as 0.3 or 30%"),
        ({"criterion": "obd"}, "criterion must be one of obs, magnitude, wanda, dsnot, random"),
        ({"compensation": "full"}, "compensation must be one of plain, affine, none"),
        ({"allocation": "best"}, "allocation must be one of score, uniform, optimal, evolutionary"),
        ({"stages": 0}, "stages must be a whole number of at least 1"),
        ({"trajectory": {"samples": 3}}, "trajectory must be left out with activations 'noised'"),
        ({"boundaries": (5, 5)}, "boundaries must be distinct"),
        ({"boundaries": (0,)}, "boundaries must be distinct whole timesteps of at least 1"),
        ({"threshold": 1.0}, r"threshold must be in \(0, 1\)"),
        ({"snr_weight": -1.0}, "snr_weight must be finite"),
        ({"max_sparsity": 0.0}, r"max_sparsity must be in \(0, 1\]"),
        ({"null_share": 1.5}, r"null_share must be in \[0, 1\]"),
        ({"damping": -1.0}, "damping must be finite"),
        ({"samples": 0}, "samples must be a whole number of at least 1"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"round_to": True}, "round_to must be a whole number"),
        ({"seed": -1}, "seed must be a whole number, not negative"),
        ({"allocation": "explicit"}, "stage_sparsity must be given"),
        ({"stage_sparsity": (0.1,)}, "allocation must be 'explicit'"),
        ({"allocation": "explicit", "stage_sparsity": (1.2,)}, r"stage_sparsity must be in \[0"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**fields)


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match="got sparcity"):
        PruneConfig.from_dict({"sparcity": 0.3})


@pytest.mark.parametrize(
    "text, message",
    [(None, "but there is none"), ("{", "must be a JSON object"), ("[1]", "got list")],
)
def test_bad_files_are_refused(tmp_path, text, message):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        PruneConfig.from_file(file)


def test_file(tmp_path):
    (tmp_path / "config.json").write_text('{"sparsity": 0.2, "boundaries": [100, 500]}')
    config = PruneConfig.from_file(tmp_path / "config.json")
    assert config == PruneConfig(sparsity=0.2, boundaries=(100, 500))
