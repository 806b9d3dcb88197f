import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicdiff.allocation.shares import layer_counts, score_give, stage_shares
from mosaicdiff.groups import Columns, PrunableLayer, Rows

STAGES = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0.01, 1), min_size=n, max_size=n),
        st.lists(st.integers(1, 40), min_size=n, max_size=n),
    )
)


@given(STAGES, st.floats(0, 0.79), st.floats(0.8, 1))
def test_shares_meet_the_target_under_the_cap(stages, target, cap):
    give, steps = stages
    shares = stage_shares(give, steps, target, cap)
    mean = sum(n * s for n, s in zip(steps, shares, strict=True)) / sum(steps)
    assert mean == pytest.approx(target, abs=1e-9)
    assert all(0 <= s <= cap + 1e-12 for s in shares)
    free = [(g, s) for g, s in zip(give, shares, strict=True) if s < cap - 1e-9]
    ratios = [s / g for g, s in free]
    assert max(ratios, default=0) == pytest.approx(min(ratios, default=0), abs=1e-9)


def test_what_a_capped_stage_cannot_give_goes_to_the_others():
    assert stage_shares([1.0, 0.5], [1, 1], 0.6, 0.7) == pytest.approx([0.7, 0.5])


def test_a_target_out_of_reach_says_what_can_be_had():
    with pytest.raises(ValueError, match=r"at most 0\.4000 with max_sparsity 0\.8.*Ask for less"):
        stage_shares([1.0, 0.0], [1, 1], 0.5, 0.8)


def test_score_give_is_clamped():
    assert score_give([-0.3, 0.25, 1.4]) == [1.0, 0.75, 0.0]


def layers(blocks: int, heads: int, neurons: int, width: int = 32) -> list[PrunableLayer]:
    found = []
    places = (Columns("r"),), (Rows("w"),)
    for i in range(blocks):
        found.append(PrunableLayer(f"{i}.attn", "heads", *places, heads, width, 4 * width * 96))
        found.append(PrunableLayer(f"{i}.ff", "neurons", *places, neurons, 1, 2 * 96))
    return found


@given(st.integers(1, 8), st.integers(1, 16), st.integers(200, 800), st.floats(0, 0.9))
def test_rounding_keeps_the_mean(blocks, heads, neurons, share):
    rows = layers(blocks, heads, neurons)
    counts = layer_counts(rows, [share] * len(rows))
    total = sum(row.groups * row.cost for row in rows)
    gone = sum(n * row.cost for n, row in zip(counts, rows, strict=True))
    assert all(0 <= n <= row.groups for n, row in zip(counts, rows, strict=True))
    # Neurons can pay for the heads' rounding unless heads are most of the work, or so few neurons
    # are left (or gone) that they come to less than one head.
    neuron, head = 2 * 96, 4 * 32 * 96
    spare = min(share, 1 - share) * blocks * neurons * neuron
    if neurons * neuron > 2 * head and (spare > head or share == 0):
        assert abs(gone / total - share) < 0.005


def test_equal_remainders_are_spread_through_the_depth():
    rows = [row for row in layers(6, 6, 768) if row.kind == "heads"]
    counts = layer_counts(rows, [0.25] * 6)  # 1.5 heads of 6 in every block
    assert sorted(counts) == [1, 1, 1, 2, 2, 2]
    assert counts[:3] != [2, 2, 2]


@pytest.mark.parametrize("multiple", [8, 64, 100])
def test_kept_neurons_are_a_multiple(multiple):
    rows = layers(4, 6, 768)
    counts = layer_counts(
        rows,
        [0.37] * len(rows),
        [
            sorted({0, *(row.groups - k for k in range(0, row.groups + 1, multiple))})
            if row.kind == "neurons"
            else range(row.groups + 1)
            for row in rows
        ],
    )
    for row, count in zip(rows, counts, strict=True):
        if row.kind == "neurons":
            kept = row.groups - count
            assert kept % multiple == 0 or kept == row.groups


def test_nothing_and_everything():
    rows = layers(2, 4, 100)
    assert layer_counts(rows, [0.0] * 4) == [0, 0, 0, 0]
    assert layer_counts(rows, [1.0] * 4) == [4, 100, 4, 100]
