"""How a Hessian update is cut into work: tiles and their order, splits over tokens, launches.

Pure functions of sizes, beside the table of configurations; the kernels are in ``hessian``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

# Tokens that go into one plain float32 partial sum. A tensor core cuts off what its accumulator
# cannot hold, once for every 16 tokens, so a sum of squares of 8192 tokens comes out low by about
# 1.5e-5 of itself; twice as many tokens, twice as low.
CHUNK_TOKENS = 8192
# What an item costs beside its tokens, in tokens: filling the pipeline, storing and merging.
ITEM_TOKENS = 256
# Parts of a tile at most, and rounds of the programs over what is cut up.
MAX_SPLITS = 64
MAX_ROUNDS = 8
# The workspace of one launch, but for what is cut up (MAX_ROUNDS tiles for each program); tiles
# beyond it are done in further launches, and so are tokens beyond eight partial sums.
WORKSPACE_BYTES = 512 << 20
LAUNCH_TOKENS = 8 * CHUNK_TOKENS


@dataclass(frozen=True)
class Config:
    """A tile of H and how the product kernel is launched.

    Args:
        rows, cols: the tile; cols is a multiple of rows.
        tokens: tokens in one step of the product.
        warps: warps of a program.
        stages: steps of tokens in flight.
        two_sums: hold a second sum in registers, to which partial sums are added, so that an item
            may have several: needed for weights of samples.
    """

    rows: int
    cols: int
    tokens: int
    warps: int
    stages: int
    two_sums: bool


@dataclass(frozen=True)
class Plan:
    """How the tiles ("units") of one launch are shared by its programs.

    Args:
        programs: programs that take items in turn.
        full: units that keep every program busy, in whole rounds.
        full_parts: items of each such unit, over its tokens.
        splits: items of each unit after those.
        per_sample, samples: tokens of a sample, and samples.
        chunk, tail_chunk: most tokens of one partial sum, of the full units and of the others.
        items: work items, each with a tile of the workspace.
    """

    programs: int
    full: int
    full_parts: int
    splits: int
    per_sample: int
    samples: int
    chunk: int
    tail_chunk: int
    items: int


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def make_plan(units: int, tokens: int, samples: int, programs: int, config: Config) -> Plan:
    """Cut the work of ``units`` tiles over ``tokens`` tokens into items for ``programs``.

    Tiles that fill whole rounds of the programs are not split (beyond what the length of a
    partial sum asks for). The rest would leave most programs idle for a round (n = 4608: 342
    tiles are 2.6 rounds of 132), and a narrow layer has nothing but a rest (n = 1152: 45
    tiles): those are split over tokens into as many parts as finish soonest.
    """
    full = units // programs * programs
    tail = units - full
    per_sample = tokens // samples
    pieces = _ceil_div(per_sample, CHUNK_TOKENS)
    chunk = _chunk(per_sample, pieces, config)
    full_parts = 1 if config.two_sums else _ceil_div(tokens, chunk)

    def finished_after(splits: int) -> float:
        rounds = _ceil_div(tail * splits, programs)
        return rounds * (tokens / splits + ITEM_TOKENS)

    fewest = 1 if config.two_sums else full_parts
    most = min(MAX_SPLITS, tokens // config.tokens, MAX_ROUNDS * programs // max(1, tail))
    most = max(fewest, most)
    splits = min(range(fewest, most + 1), key=finished_after)
    if not config.two_sums:
        tail_chunk = _chunk(per_sample, splits, config)
        splits = _ceil_div(per_sample, tail_chunk)
    else:
        # Enough pieces that every part has the same number of them, unless samples are so many
        # that a sample more or less is no matter.
        if samples < 8 * splits:
            pieces *= splits // gcd(splits, pieces * samples)
        tail_chunk = _chunk(per_sample, pieces, config)
        splits = min(splits, samples * _ceil_div(per_sample, tail_chunk))
    return Plan(
        programs=programs,
        full=full,
        full_parts=full_parts,
        splits=splits,
        per_sample=per_sample,
        samples=samples,
        chunk=chunk,
        tail_chunk=tail_chunk,
        items=full * full_parts + tail * splits,
    )


def _chunk(per_sample: int, pieces: int, config: Config) -> int:
    """Return the tokens of each of ``pieces`` of a sample, in whole steps of the product."""
    return _ceil_div(_ceil_div(per_sample, pieces), config.tokens) * config.tokens


def lower_tiles(n: int, rows: int, cols: int, programs: int) -> list[tuple[int, int, int]]:
    """Return (row of tiles, column of tiles, whether it sums the columns) in launch order.

    Tiles that touch the lower triangle, one of each row of tiles with the flag. Programs that
    run at once take neighbours: bands of so many rows that ``programs`` tiles make a square,
    walked column by column. The flagged tiles take longer; they come last, where the work is cut
    finest.
    """
    band = max(1, round((programs * cols / rows) ** 0.5))
    tiles = _ceil_div(n, rows)
    ordinary: list[tuple[int, int, int]] = []
    flagged: list[tuple[int, int, int]] = []
    for top in range(0, tiles, band):
        bottom = min(tiles, top + band)
        for j in range((bottom - 1) * rows // cols + 1):
            for i in range(max(top, j * cols // rows), bottom):
                last = i * rows // cols == j
                (flagged if last else ordinary).append((i, j, int(last)))
    return ordinary + flagged


@lru_cache(maxsize=64)
def tile_order(
    batch: int, n: int, rows: int, cols: int, programs: int, device: torch.device
) -> Tensor:
    """Return (units, 4) int32 on the device: batch entry, row, column, flag of each tile."""
    tiles = lower_tiles(n, rows, cols, programs)
    units = [
        (entry, *tile)
        for last in (0, 1)
        for entry in range(batch)
        for tile in tiles
        if tile[2] == last
    ]
    return torch.tensor(units, dtype=torch.int32).to(device)


def windows(order: Tensor, config: Config, programs: int, tokens: int) -> Iterator[Tensor]:
    """Yield runs of units whose workspace stays within bounds, in whole rounds of programs."""
    parts = 1 if config.two_sums else _ceil_div(tokens, CHUNK_TOKENS)
    at_once = WORKSPACE_BYTES // (4 * config.rows * config.cols * parts)
    yield from order.split(max(1, at_once // programs) * programs)
