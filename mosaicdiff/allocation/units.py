"""How coarsely the widths of layers are rounded on the device at hand: as far as it pays.

Matrix products take widths in whole tiles and vectors: one neuron more can cost as much as the rest
of its tile. A unit is free where widths that are its multiples take the time that a line between
coarser widths predicts; the finest free unit leaves an allocation the most choice, and what it
rounds it rounds to widths that are worth their time.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..adapters import Adapter
from ..files import write_text
from ..groups import Denoiser, PrunableLayer, leading_parameter
from ..statistics.capture import evaluating
from ..surgery import Surgeon
from .latency import LayerShape, make_writable, measured_under, shape_of, user_cache
from .timing import (
    Call,
    Timer,
    default_timer,
    dense_call,
    isotonic,
    layer_inputs,
    narrowed,
    timed_module,
)

#: Units that are tried, finest first: of heads, and of neurons up to the tiles of matrix kernels.
UNITS = {"heads": (1, 2, 4), "neurons": (1, 4, 8, 16, 32, 64, 128)}
#: A unit is free where its widths take at most this much longer than the line says.
FREE = 0.015
#: Where along the width is looked, as shares of the groups that are kept.
ANCHORS = (0.35, 0.6, 0.85)

_LAYOUT = 1


def fitting_unit(penalties: Mapping[int, float]) -> int:
    """Return the finest unit that is free.

    Args:
        penalties: by unit, what its widths take beyond the line, relative. Coarser units are
            never the dearer ones: what says so is noise, and pooled.
    """
    coarsest_first = sorted(penalties, reverse=True)
    pooled = isotonic([penalties[unit] for unit in coarsest_first])
    free = [u for u, penalty in zip(coarsest_first, pooled, strict=True) if penalty <= FREE]
    return min(free, default=coarsest_first[0])


def tried_widths(groups: int, units: Sequence[int]) -> list[tuple[int, dict[int, list[int]], int]]:
    """List where units are tried: kept groups before, between (by unit) and behind.

    Between two multiples of the coarsest unit that is the first odd multiple of each finer one,
    and the first behind the middle: where tiles are whole those are the widths that cost most
    beyond the line. Nowhere, if the layer is too narrow for its units.
    """
    coarsest = units[-1]
    places = {coarsest * max(1, round(share * groups / coarsest)) for share in ANCHORS}
    found = []
    for start in sorted(place for place in places if place + coarsest <= groups):
        between: dict[int, list[int]] = {}
        for unit in units[:-1]:
            first = (unit, coarsest // 2 + unit)
            between[unit] = [start + n for n in first if n % (2 * unit) and n < coarsest]
        found.append((start, between, start + coarsest))
    return found


def measure_units(
    denoiser: Denoiser,
    adapter: Adapter,
    *,
    batch_size: int = 1,
    repeats: int = 9,
    advance: Callable[[], None] = lambda: None,
    timer: Timer | None = None,
    shared_norms: str = "exact",
) -> dict[LayerShape, int]:
    """Time one layer of every shape around a few widths, and return the unit of each.

    All widths of a shape are timed in turn, round by round; each width is compared with the line
    between its neighbours within its own round, and the median over rounds and places counts.

    Args:
        denoiser: dense, on the device to be measured; it is left as it is.
        adapter: of the denoiser.
        batch_size: rows of one call.
        repeats: rounds, after one that is not counted.
        advance: called after each of the repeats + 1 rounds of each shape.
        timer: given a call, returns its milliseconds; by default that of the device.
        shared_norms: as `PruneConfig` has it.

    Raises:
        ValueError: the denoiser cannot be timed where it is.
    """
    timer = timer or default_timer(leading_parameter(denoiser).device)
    layers = list(adapter.layers(denoiser, shared_norms))
    examples: dict[LayerShape, PrunableLayer] = {}
    for layer in layers:
        examples.setdefault(shape_of(denoiser, layer), layer)
    units = {}
    with torch.no_grad(), evaluating(denoiser):
        names = [timed_module(layer)[0] for layer in examples.values()]
        inputs = layer_inputs(denoiser, names, dense_call(denoiser, adapter, batch_size))
        surgeon = Surgeon(adapter, layers)
        for shape, layer in examples.items():
            args, kwargs = inputs[timed_module(layer)[0]]
            places = tried_widths(layer.groups, UNITS[layer.kind])
            widths = sorted({n for place in places for n in _all_of(place)})
            calls: dict[int, Call] = {
                n: partial(narrowed(denoiser, surgeon, layer, n).eval(), *args, **kwargs)
                for n in widths
            }
            rounds = _time(calls, repeats, timer, advance)
            units[shape] = fitting_unit(penalties_of(places, rounds)) if places else 1
    return units


def penalties_of(
    places: Sequence[tuple[int, Mapping[int, Sequence[int]], int]],
    rounds: Sequence[Mapping[int, float]],
) -> dict[int, float]:
    """Return what the widths of each unit take beyond the line, the median over rounds and places.

    Args:
        places: as `tried_widths` lists them.
        rounds: milliseconds by kept groups.
    """
    found: dict[int, list[float]] = {}
    for low, between, high in places:
        found.setdefault(high - low, []).append(0.0)  # the coarsest is what is compared with
        for unit, widths in between.items():
            for times in rounds:
                for width in widths:
                    line = float(np.interp(width, (low, high), (times[low], times[high])))
                    found.setdefault(unit, []).append(times[width] / line - 1)
    return {unit: statistics.median(values) for unit, values in found.items()}


def with_units(
    layers: Sequence[PrunableLayer],
    denoiser: Denoiser,
    adapter: Adapter,
    *,
    batch_size: int = 1,
    cache: Path | Literal["user"] | None = "user",
    shared_norms: str = "exact",
) -> tuple[PrunableLayer, ...]:
    """Return the layers with the units of the device at hand, measured there once and kept.

    Args:
        layers: of the denoiser.
        denoiser: dense, on the device where it will run.
        adapter: of the denoiser.
        batch_size: rows of one call.
        cache: folder of what was measured; `user` is mosaicdiff/latency in $XDG_CACHE_HOME or
            ~/.cache; with None nothing is read or stored.
        shared_norms: as `PruneConfig` has it.

    Raises:
        ValueError: the denoiser is on the meta device, or the cache is damaged or closed.
    """
    device = leading_parameter(denoiser).device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            "prune: round_to must be a number where nothing can be timed, got 'auto' for a model "
            f"on {device.type}. Move the model to the device where it will run, or give a "
            "multiple, e.g. 64."
        )
    units = _units(denoiser, adapter, batch_size, cache, shared_norms)
    return tuple(replace(layer, unit=units[shape_of(denoiser, layer)]) for layer in layers)


def _units(
    denoiser: Denoiser,
    adapter: Adapter,
    batch_size: int,
    cache: Path | Literal["user"] | None,
    shared_norms: str,
) -> dict[LayerShape, int]:
    def measure() -> dict[LayerShape, int]:
        return measure_units(denoiser, adapter, batch_size=batch_size, shared_norms=shared_norms)

    if cache is None:
        return measure()
    folder = user_cache() if cache == "user" else Path(cache)
    key = json.dumps(["units", _LAYOUT, measured_under(denoiser, batch_size, shared_norms)])
    path = folder / f"units-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if path.exists():
        return _read(path)
    make_writable(folder)
    units = measure()
    rows = [{"shape": asdict(shape), "unit": unit} for shape, unit in units.items()]
    write_text(path, json.dumps(rows, indent=1) + "\n")
    return units


def _read(path: Path) -> dict[LayerShape, int]:
    try:
        return {
            LayerShape(**row["shape"] | {"inputs": tuple(row["shape"]["inputs"])}): int(row["unit"])
            for row in json.loads(path.read_text(encoding="utf-8"))
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"prune: {path} must hold the units measured for round_to 'auto', got {error}. Delete "
            "it: they are measured again."
        ) from error


def _all_of(place: tuple[int, Mapping[int, Sequence[int]], int]) -> list[int]:
    low, between, high = place
    return [low, *(n for widths in between.values() for n in widths), high]


def _time(
    calls: Mapping[int, Call], repeats: int, timer: Timer, advance: Callable[[], None]
) -> list[dict[int, float]]:
    """Time every call once a round, in turn and back in every second; the first round warms up."""
    rounds = []
    for repeat in range(repeats + 1):
        order = sorted(calls, reverse=repeat % 2 == 1)
        times = {width: timer(calls[width]) for width in order}
        if repeat:
            rounds.append(times)
        advance()
    return rounds
