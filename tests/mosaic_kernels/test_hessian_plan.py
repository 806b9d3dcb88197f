"""How a Hessian update is cut into work, and the table it is launched from: no GPU needed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs triton")

from mosaic_kernels._triton import hessian_configs, hessian_plan  # noqa: E402
from mosaic_kernels._triton.hessian_configs import TABLE  # noqa: E402

CPU = torch.device("cpu")
CONFIGS = sorted({c for table in TABLE.values() for few in table.values() for c in few}, key=str)
WIDE = TABLE[90]["wide", 16][0]
TWO_SUMS = TABLE[90]["two sums", 16][0]


@given(n=st.integers(1, 5000), config=st.sampled_from(CONFIGS), programs=st.integers(1, 150))
def test_tiles_cover_the_lower_triangle_once(n, config, programs):
    tiles = hessian_plan.lower_tiles(n, config.rows, config.cols, programs)
    expected = {
        (i, j)
        for i in range(-(-n // config.rows))
        for j in range(-(-n // config.cols))
        if j * config.cols < min(n, (i + 1) * config.rows)
    }
    assert len(tiles) == len(expected) and {(i, j) for i, j, _ in tiles} == expected
    flagged = [i for i, _, flag in tiles if flag]
    assert sorted(flagged) == list(range(-(-n // config.rows)))


def test_programs_that_run_at_once_share_their_columns():
    tiles = hessian_plan.lower_tiles(16384, WIDE.rows, WIDE.cols, 132)
    for begin in range(0, 1320, 132):
        together = tiles[begin : begin + 132]
        rows, cols = ({tile[axis] for tile in together} for axis in (0, 1))
        assert len(rows) * WIDE.rows + len(cols) * WIDE.cols <= 3 * 132**0.5 * 256


def items_of(plan, units):
    """Return the (begin, end) tokens of every item of every unit, as the kernel cuts them."""
    found = [[] for _ in range(units)]
    for item in range(plan.items):
        unit, part, parts, length = item % max(1, plan.full), 0, plan.full_parts, plan.chunk
        part = item // max(1, plan.full)
        if item >= plan.full * plan.full_parts:
            rest = item - plan.full * plan.full_parts
            unit, part = plan.full + rest // plan.splits, rest % plan.splits
            parts, length = plan.splits, plan.tail_chunk
        pieces = -(-plan.per_sample // length)
        count = plan.samples * pieces
        segments = []
        for segment in range(count * part // parts, count * (part + 1) // parts):
            sample, piece = divmod(segment, pieces)
            begin = sample * plan.per_sample + piece * length
            segments.append((begin, min(begin + length, (sample + 1) * plan.per_sample)))
        found[unit].append(segments)
    return found


@given(
    units=st.integers(1, 400),
    samples=st.integers(1, 40),
    per_sample=st.integers(1, 30000),
    programs=st.sampled_from([1, 7, 108, 132, 148]),
    config=st.sampled_from(CONFIGS),
)
def test_items_cover_the_tokens_once(units, samples, per_sample, programs, config):
    if not config.two_sums:
        samples = 1
    tokens = samples * per_sample
    plan = hessian_plan.make_plan(units, tokens, samples, programs, config)
    assert plan.full % programs == 0 and 0 <= units - plan.full < programs
    for items in items_of(plan, units):
        cursor = 0
        for segments in items:
            assert segments  # an item without tokens would leave its tile of the workspace unset
            assert config.two_sums or len(segments) == 1
            for begin, end in segments:
                assert begin == cursor and begin < end
                assert end - begin <= hessian_plan.CHUNK_TOKENS
                cursor = end
        assert cursor == tokens
    tail = units - plan.full
    assert tail * plan.splits <= max(tail * plan.full_parts, 8 * programs)


def test_no_round_is_left_half_empty():
    tiles = len(hessian_plan.lower_tiles(4608, WIDE.rows, WIDE.cols, 132))
    assert tiles == 342
    plan = hessian_plan.make_plan(tiles, 32768, 1, 132, WIDE)
    assert (plan.full, plan.full_parts, plan.splits) == (264, 4, 5)
    narrow = len(hessian_plan.lower_tiles(1152, TWO_SUMS.rows, TWO_SUMS.cols, 132))
    assert narrow == 45
    for tokens, idle in ((2048, 1.5), (8192, 1.2), (32768, 1.1)):
        plan = hessian_plan.make_plan(narrow, tokens, 1, 132, TWO_SUMS)
        rounds = -(-plan.items // 132)
        assert plan.full == 0 and rounds * 132 <= idle * plan.items


@pytest.mark.parametrize("n, tokens", [(4608, 32768), (16384, 65536), (1152, 65536)])
def test_workspace_is_bounded(n, tokens):
    order = hessian_plan.tile_order(2, n, WIDE.rows, WIDE.cols, 132, CPU)
    windows = list(hessian_plan.windows(order, WIDE, 132, tokens))
    assert torch.equal(torch.cat(windows), order)
    for units in windows:
        plan = hessian_plan.make_plan(len(units), tokens, 1, 132, WIDE)
        assert plan.items * 4 * WIDE.rows * WIDE.cols <= 650 << 20


def test_batches_keep_the_tiles_that_take_longest_for_the_end():
    order = hessian_plan.tile_order(3, 1000, 128, 256, 132, CPU).tolist()
    flags = [flag for *_, flag in order]
    assert flags == sorted(flags) and {entry for entry, *_ in order} == {0, 1, 2}


@pytest.mark.parametrize(
    "capability, expected",
    [((8, 0), 80), ((8, 6), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100),
     ((12, 0), 80)],
)  # fmt: skip
def test_architectures(capability, expected):
    assert hessian_configs.architecture(*capability) == expected


def test_choice_and_tuning(monkeypatch):
    monkeypatch.setattr(hessian_configs, "_FOUND", {})
    choose = hessian_configs.choose_config
    assert choose(CPU, torch.bfloat16, 4608, False) == WIDE
    assert choose(CPU, torch.float16, 1152, False) == TWO_SUMS
    assert choose(CPU, torch.bfloat16, 4608, True) == TWO_SUMS
    few = hessian_configs.candidates(90, torch.bfloat16, 4608, False)
    times = hessian_configs.remember_fastest(
        CPU, torch.bfloat16, 4608, False, lambda config: float(config == few[0])
    )
    assert times == {few[0]: 1.0, **dict.fromkeys(few[1:], 0.0)}
    assert choose(CPU, torch.bfloat16, 4608, False) == few[1]
    assert choose(CPU, torch.bfloat16, 4608, True) == TWO_SUMS


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_tuning_without_a_device_says_so():
    import mosaic_kernels as mk

    with pytest.raises(
        RuntimeError, match="tune_hessian: needs a CUDA device, and torch sees none"
    ):
        mk.tune_hessian(64, torch.bfloat16)
