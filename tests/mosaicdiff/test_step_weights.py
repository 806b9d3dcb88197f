"""How much each step of a sampled trajectory counts."""

import math

import pytest

from mosaicdiff.trajectory.weights import WEIGHTS, step_weights
from mosaicdiff.trajectory_config import TrajectoryConfig


def test_log_decrease_by_hand():
    got = step_weights("log_decrease", 4)
    wanted = [0.8 + 0.4 * math.log(n) / math.log(4) for n in (4, 3, 2, 1)]
    assert got == pytest.approx(wanted)
    assert got == pytest.approx([1.2, 1.116992500, 1.0, 0.8])


def test_linear_decrease_by_hand():
    assert step_weights("linear_decrease", 5, (1.0, 3.0)) == pytest.approx([3, 2.5, 2, 1.5, 1])


@pytest.mark.parametrize("kind", ["log", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_increasing_kinds_are_the_decreasing_ones_backwards(kind, steps):
    down = step_weights(f"{kind}_decrease", steps)
    assert step_weights(f"{kind}_increase", steps) == pytest.approx(down[::-1])
    assert list(down) == sorted(down, reverse=True)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_ends_and_lengths(kind):
    for steps in (2, 3, 28):
        got = step_weights(kind, steps, (0.5, 2.0))
        assert len(got) == steps
        if kind != "uniform":
            assert min(got[0], got[-1]) == pytest.approx(0.5)
            assert max(got[0], got[-1]) == pytest.approx(2.0)
    assert step_weights(kind, 1, (0.5, 2.0)) == ((1.0,) if kind == "uniform" else (2.0,))


def test_uniform_is_one_whatever_the_range():
    assert step_weights("uniform", 3, (0.1, 9.0)) == (1.0, 1.0, 1.0)


def test_lists_and_functions_are_taken_as_they_are():
    assert step_weights([3, 1, 0.5], 3) == (3.0, 1.0, 0.5)
    assert step_weights(lambda i, n: (i + 1) / n, 4) == (0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("log", "kind must be one of log_decrease, .*, got 'log'"),
        ([1.0, 2.0], "weights must be 3, one for each sampling step, got 2"),
        ([], "weights must be 3, .* got 0"),
        ([1.0, 0.0, 1.0], "finite and more than 0, got 0.0"),
        ([1.0, -1.0, 1.0], "more than 0, got -1.0"),
        ([1.0, float("nan"), 1.0], "finite and more than 0, got nan"),
        (lambda i, n: math.inf, "finite and more than 0, got inf"),
    ],
)
def test_what_no_weights_can_be_is_refused(kind, message):
    with pytest.raises(ValueError, match=f"step_weights: .*{message}"):
        step_weights(kind, 3)


def test_a_function_is_written_out():
    config = TrajectoryConfig(weights=lambda i, n: float(n - i))
    assert config.to_dict(3)["weights"] == [3.0, 2.0, 1.0]
    assert TrajectoryConfig(**config.to_dict(3)).weights == (3.0, 2.0, 1.0)
