"""What a prunable layer costs on the device at hand, measured at several widths."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..adapters import Adapter, adapter_for
from ..files import write_text
from ..groups import Denoiser, PrunableLayer, leading_parameter
from ..statistics.capture import evaluating
from ..surgery import Surgeon
from .timing import (
    Call,
    Timer,
    default_timer,
    dense_call,
    isotonic,
    layer_inputs,
    narrowed,
    time_rounds,
    timed_module,
    widths,
)

#: Kept groups, ascending from 0 to all, and the milliseconds of a layer that wide.
Curve = tuple[tuple[int, ...], tuple[float, ...]]

_LAYOUT = 1
_CURES = {
    "device": "Measure one here, with this number of threads, by measure_table.",
    "dtype": "Measure one in this dtype by measure_table.",
    "batch_size": "Measure one for this batch size by measure_table.",
    "torch": "Measure one with this version by measure_table.",
    "network": "Measure one of this denoiser by measure_table.",
}


@dataclass(frozen=True)
class LayerShape:
    """What makes two layers of one denoiser the same to the clock.

    Args:
        kind: `heads` or `neurons`.
        groups: how many there are in the dense layer.
        width: columns of one group.
        features: outputs of the reader.
        inputs: inputs of each writer.
        cost: MACs of one group for one sample; with the rest it tells the number of tokens.
    """

    kind: str
    groups: int
    width: int
    features: int
    inputs: tuple[int, ...]
    cost: int


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of every prunable layer shape of one denoiser on one device.

    Args:
        device: name of the GPU, or of the CPU and its number of threads.
        dtype: of the parameters, and how float32 is multiplied where that is not in full.
        batch_size: rows of one call.
        torch: its version.
        network: fingerprint of the denoiser's configuration, modules and attention processors.
        fixed_ms: the dense call less the sum of its prunable layers, or 0 where that is negative.
        excess_ms: by how much the layers alone exceed the dense call, or 0; they were timed one
            by one, so that what overlaps in the whole call counts twice.
        dense_ms: the median dense call.
        curves: of each shape, non-decreasing.
    """

    device: str
    dtype: str
    batch_size: int
    torch: str
    network: str
    fixed_ms: float
    excess_ms: float
    dense_ms: float
    curves: Mapping[LayerShape, Curve]

    def milliseconds(self, shape: LayerShape, kept: int) -> float:
        """Return what a layer costs with `kept` groups, by lines between the measured widths.

        Raises:
            ValueError: the table has no such shape, or the shape not so many groups.
        """
        return float(np.interp(kept, *self._points(shape, "kept", kept)))

    def curve(self, shape: LayerShape, groups: int | None = None) -> np.ndarray:
        """Return what a layer costs when it keeps 0, 1, ..., `groups` groups.

        Args:
            shape: as `shape_of` gives it.
            groups: the last number kept; all by default.

        Returns:
            (groups + 1,) milliseconds, float64, non-decreasing.

        Raises:
            ValueError: the table has no such shape, or the shape not so many groups.
        """
        groups = shape.groups if groups is None else groups
        return np.interp(np.arange(groups + 1), *self._points(shape, "groups", groups))

    def check(self, denoiser: Denoiser, batch_size: int, shared_norms: str = "exact") -> None:
        """Refuse a denoiser that is not the one, or not where, the table was measured.

        Raises:
            ValueError: another device, thread count, dtype, batch size, torch or denoiser.
        """
        here = measured_under(denoiser, batch_size, shared_norms)
        network = here.pop("network")
        for name, value in here.items():
            self._same(name, value)
        for layer in adapter_for(denoiser).layers(denoiser, shared_norms):
            self._points(shape_of(denoiser, layer), "groups", layer.groups)
        # Of the same shapes but another depth, say, the fixed part is another.
        self._same("network", network)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        rows = [
            {"shape": asdict(shape), "kept": list(kept), "milliseconds": list(milliseconds)}
            for shape, (kept, milliseconds) in self.curves.items()
        ]
        return {"layout": _LAYOUT, **self.__dict__, "curves": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyTable:
        """Make a table of what `to_dict` gave.

        Raises:
            ValueError: the values are not those of a table of this layout.
        """
        try:
            if values["layout"] != _LAYOUT:
                raise ValueError(f"layout {values['layout']}")
            rest = {k: v for k, v in values.items() if k not in ("layout", "curves")}
            curves = {}
            for row in values["curves"]:
                shape = row["shape"] | {"inputs": tuple(row["shape"]["inputs"])}
                points = tuple(row["kept"]), tuple(map(float, row["milliseconds"]))
                curves[LayerShape(**shape)] = points
            return cls(**rest, curves=curves)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"LatencyTable: values must be those of a table of layout {_LAYOUT}, got {error}. "
                "Measure the table again by measure_table."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table that `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"LatencyTable: path must hold a table in JSON, got {path} ({error}). "
                "Measure the table again by measure_table."
            ) from error
        return cls.from_dict(values)

    def _same(self, name: str, here: Any) -> None:
        table = getattr(self, name)
        if table != here:
            raise ValueError(
                f"LatencyTable: {name} must be {here!r}, as that of the denoiser to be timed, "
                f"got {table!r}. {_CURES[name]}"
            )

    def _points(self, shape: LayerShape, argument: str, groups: int) -> Curve:
        if shape not in self.curves:
            raise ValueError(
                f"LatencyTable: shape must be one of the {len(self.curves)} measured, "
                f"got {shape}. {_CURES['network']}"
            )
        if not 0 <= groups <= shape.groups:
            raise ValueError(
                f"LatencyTable: {argument} must be in 0..{shape.groups}, got {groups}. "
                "Count the groups of the dense layer."
            )
        return self.curves[shape]


def shape_of(denoiser: Denoiser, layer: PrunableLayer) -> LayerShape:
    """Return the key of a layer of a dense denoiser in its latency table."""
    return LayerShape(
        kind=layer.kind,
        groups=layer.groups,
        width=layer.width,
        features=sum(denoiser.get_submodule(r.module).weight.shape[0] for r in layer.readers),
        inputs=tuple(_row(denoiser.get_submodule(w.module)) for w in layer.writers),
        cost=layer.cost,
    )


def _row(writer: Any) -> int:
    """Count the weights of one row of a writer; none of a norm without."""
    weight = getattr(writer, "weight", None)
    return 0 if weight is None else weight[0].numel()


def measure_table(
    denoiser: Denoiser,
    adapter: Adapter,
    *,
    batch_size: int = 1,
    points: int = 9,
    repeats: int = 10,
    advance: Callable[[], None] = lambda: None,
    timer: Timer | None = None,
    shared_norms: str = "exact",
) -> LatencyTable:
    """Time one layer of every shape at several widths, and the dense call.

    All are timed in turn, round by round, so that a drifting machine drifts under all of them;
    the medians over the rounds count. Each layer gets the inputs it has in a dense call.

    Args:
        denoiser: dense, on the device to be measured; it is left as it is.
        adapter: of the denoiser.
        batch_size: rows of one call.
        points: widths of one shape; all of them up to twice as many groups, and otherwise so
            many, evenly spread, and the narrowest that is not nothing.
        repeats: rounds, after one that is not counted.
        advance: called after each of the repeats + 1 rounds.
        timer: given a call, returns its milliseconds; by default CUDA events on a GPU and the
            clock on the CPU, both over as many calls as take a millisecond.
        shared_norms: as `PruneConfig` has it.

    Raises:
        ValueError: an argument is out of range, or the denoiser cannot be pruned or timed.
    """
    limits = (("batch_size", batch_size, 1), ("points", points, 2), ("repeats", repeats, 1))
    for name, value, least in limits:
        if value < least:
            raise ValueError(
                f"measure_table: {name} must be at least {least}, got {value}. The default will do."
            )
    adapter.check(denoiser)
    timer = timer or default_timer(leading_parameter(denoiser).device)
    found = adapter.layers(denoiser, shared_norms)
    layers = [(layer, shape_of(denoiser, layer)) for layer in found]
    examples: dict[LayerShape, PrunableLayer] = {}
    for layer, shape in layers:
        examples.setdefault(shape, layer)
    kept = {shape: widths(layer, points) for shape, layer in examples.items()}
    with torch.no_grad(), evaluating(denoiser):
        dense = dense_call(denoiser, adapter, batch_size)
        names = [timed_module(layer)[0] for layer in examples.values()]
        inputs = layer_inputs(denoiser, names, dense)
        surgeon = Surgeon(adapter, [layer for layer, _ in layers])
        calls: list[Call] = [dense]
        for shape, layer in examples.items():
            args, kwargs = inputs[timed_module(layer)[0]]
            modules = [narrowed(denoiser, surgeon, layer, count).eval() for count in kept[shape]]
            calls += [partial(module, *args, **kwargs) for module in modules]
        dense_ms, *rest = time_rounds(calls, repeats, timer, advance)
    times = iter(rest)
    curves = {}
    for shape, counts in kept.items():
        took = isotonic([next(times) for _ in counts])
        # Of a module that holds more, the layer's own is what it takes beyond none of it.
        beside = 0.0 if timed_module(examples[shape])[1] else took[0]
        curves[shape] = counts, tuple(value - beside for value in took)
    fixed_ms = dense_ms - sum(curves[shape][1][-1] for _, shape in layers)
    return LatencyTable(
        **measured_under(denoiser, batch_size, shared_norms),
        fixed_ms=max(0.0, fixed_ms),
        excess_ms=max(0.0, -fixed_ms),
        dense_ms=dense_ms,
        curves=curves,
    )


def latency_table(
    denoiser: Denoiser,
    adapter: Adapter,
    *,
    batch_size: int = 1,
    cache: Path | Literal["user"] | None = "user",
    refresh: bool = False,
    advance: Callable[[], None] = lambda: None,
    shared_norms: str = "exact",
) -> LatencyTable:
    """Read the table measured before under the same conditions, or measure and store it.

    Args:
        denoiser: as `measure_table` takes it.
        adapter: of the denoiser.
        batch_size: rows of one call.
        cache: folder of the stored tables; `user` is mosaicdiff/latency in $XDG_CACHE_HOME or
            ~/.cache; with None nothing is read or stored.
        refresh: measure even if there is a table, and replace it.
        advance: called after each round of a measurement.
        shared_norms: as `PruneConfig` has it.

    Raises:
        ValueError: the cache cannot be written or holds a damaged file, or `measure_table`
            refuses.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size, "advance": advance, "shared_norms": shared_norms,
    }  # fmt: skip
    if cache is None:
        return measure_table(denoiser, adapter, **options)
    folder = user_cache() if cache == "user" else Path(cache)
    key = json.dumps([_LAYOUT, measured_under(denoiser, batch_size, shared_norms)])
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if path.exists() and not refresh:
        table = LatencyTable.load(path)
        table.check(denoiser, batch_size, shared_norms)
        return table
    make_writable(folder)
    table = measure_table(denoiser, adapter, **options)
    table.save(path)
    return table


def measured_under(denoiser: Denoiser, batch_size: int, shared_norms: str) -> dict[str, Any]:
    """Return everything but the numbers: what must agree for a table to hold."""
    parameter = leading_parameter(denoiser)
    if parameter.device.type == "cuda":
        device = torch.cuda.get_device_name(parameter.device)
    else:
        name = _cpu_name() if parameter.device.type == "cpu" else str(parameter.device)
        device = f"{parameter.device.type} {name}, {torch.get_num_threads()} threads"
    dtype = str(parameter.dtype).removeprefix("torch.")
    precision = torch.get_float32_matmul_precision()
    if parameter.dtype == torch.float32 and precision != "highest":
        dtype += f", {precision} matmul precision"
    config = {k: v for k, v in denoiser.config.items() if not k.startswith("_")}
    lines = [] if shared_norms == "exact" else [f"norms {shared_norms}"]
    lines += [type(denoiser).__name__, json.dumps(config, sort_keys=True, default=str)]
    for path, module in denoiser.named_modules():
        processor = type(getattr(module, "processor", None)).__name__
        lines.append(f"{path} {type(module).__name__} {processor}")
    return {
        "device": device,
        "dtype": dtype,
        "batch_size": batch_size,
        "torch": str(torch.__version__),
        "network": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def user_cache() -> Path:
    """Return the folder of what was measured on this machine."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "mosaicdiff" / "latency"


def make_writable(folder: Path) -> None:
    """Refuse before a measurement, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(
            f"latency_table: cache must be a folder that can be written, got {folder}. "
            "Give another, or None to store nothing."
        )
