import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicdiff.trajectory.schedule import NAMED_SCHEDULES, NoiseSchedule
from mosaicdiff.trajectory.stages import Division, divide, stage_means

# First and last t (counted from 1) of the middle stage, from the formulas.
REFERENCE = [
    ("linear", 0.0, 0.5, 98, 604),
    ("linear", 0.0, 0.6, 121, 560),
    ("linear", 0.02, 0.5, 86, 576),
    ("linear", 0.01, 0.55, 104, 569),
    ("scaled_linear", 0.0, 0.5, 93, 893),
    ("scaled_linear", 0.0, 0.7, 201, 781),
    ("squaredcos_cap_v2", 0.0, 0.5, 329, 1000),
]


@pytest.mark.parametrize("name, weight, threshold, first, last", REFERENCE)
def test_reference_stages(name, weight, threshold, first, last):
    schedule = NoiseSchedule.named(name)
    division = divide(schedule, threshold=threshold, snr_weight=weight)
    middle = next(stage for stage in division.stages if stage.name == "middle")
    assert (middle.first + 1, middle.last + 1) == (first, last)
    assert (division.stages[0].name == "early") == (last < 1000)


def is_partition(division: Division, total: int) -> bool:
    edges = [(stage.first, stage.last) for stage in division.stages]
    joined = all(a[0] == b[1] + 1 for a, b in zip(edges, edges[1:], strict=False))
    return edges[0][1] == total - 1 and edges[-1][0] == 0 and joined


@given(
    st.sampled_from(NAMED_SCHEDULES),
    st.floats(0.05, 0.95),
    st.floats(0, 0.3),
    st.floats(0.05, 5),
)
def test_stages_partition_the_timesteps(name, threshold, weight, power):
    schedule = NoiseSchedule.named(name)
    division = divide(schedule, power=power, threshold=threshold, snr_weight=weight)
    assert is_partition(division, len(schedule))
    assert all(len(stage) > 0 for stage in division.stages)
    found = division.stage_of_log_snr(schedule.log_snr)
    by_timestep = [division.stage_of_timestep(t) for t in schedule.timesteps]
    clamped = np.abs(schedule.log_snr) >= 14
    assert (found == by_timestep)[~clamped].all()


@given(st.lists(st.integers(1, 999), min_size=1, max_size=6, unique=True))
def test_explicit_boundaries(starts):
    schedule = NoiseSchedule.named("linear")
    division = Division.at_timesteps(schedule, starts)
    assert len(division) == len(starts) + 1
    assert is_partition(division, 1000)
    assert [s.first for s in division.stages] == [*sorted(starts, reverse=True), 0]


@given(st.lists(st.integers(0, 999), min_size=1, max_size=8, unique=True))
def test_no_stage_is_left_without_steps(timesteps):
    schedule = NoiseSchedule.named("linear")
    visited = schedule.log_snr[sorted(timesteps, reverse=True)]
    division = divide(schedule).without_empty(schedule, visited)
    assert all(division.count_steps(visited))
    assert sum(division.count_steps(visited)) == len(timesteps)
    assert is_partition(division, 1000)


def test_boundaries_outside_the_schedule_are_refused():
    with pytest.raises(ValueError, match=r"timesteps in 1\.\.999"):
        Division.at_timesteps(NoiseSchedule.named("linear"), [1000])


def test_stage_means():
    schedule = NoiseSchedule.named("linear")
    division = Division.at_timesteps(schedule, [500])
    visited = schedule.log_snr[[900, 700, 100]]
    assert stage_means(division, np.array([1.0, 2.0, 5.0]), visited) == [1.5, 5.0]
