"""What `mosaicdiff bench` measured of the denoiser: rows, and where the time goes."""

from __future__ import annotations

from dataclasses import fields

from ..evaluate.bench import BenchRow
from ..evaluate.spent import TimeSpent
from ..quantities import human_bytes
from .data import Bench, Page
from .markup import Markup, element
from .spent_bars import PART_CLASSES, SpentBar, spent_chart
from .svg import both_widths
from .tables import data_table

_COLUMNS = (
    "Network",
    "Mode",
    "Batch",
    "Steps",
    "Time of a call",
    "Time an image",
    "Speed-up",
    "Fewer MACs",
    "Efficiency",
    "Over eager dense",
    "Peak memory",
)


def speed_section(page: Page) -> Markup | None:
    """Return the benchmark's table and bars; None where there is no benchmark."""
    bench = page.bench
    if bench is None:
        return None
    caption = (
        f"The denoiser of {bench.model} without the rest of its pipeline, dense and pruned timed "
        "in turn in each mode of execution. Efficiency is the speed-up in a mode over the ratio "
        "of MACs: 1 is what the arithmetic allows."
    )
    machine = ", ".join(f"{name} {value}" for name, value in bench.machine.items())
    return element(
        "section",
        element("h2", "Speed of the denoiser"),
        element("p", caption, class_="caption"),
        _spent(bench),
        data_table(
            "Every mode, batch size and number of steps",
            _COLUMNS,
            [_cells(row) for row in bench.rows],
            texts=2,
            classes=[row.network for row in bench.rows],
        ),
        element("p", machine, class_="note"),
        id="speed",
    )


def _cells(row: BenchRow) -> list[str]:
    return [
        row.network,
        row.mode,
        f"{row.batch_size:,}",
        f"{row.steps:,}",
        f"{row.milliseconds:,.2f} ms",
        f"{row.milliseconds_per_image:,.1f} ms",
        _times(row.speedup),
        _times(row.macs_ratio),
        f"{row.efficiency:.3f}" if row.network == "pruned" else "–",
        f"{row.over_eager:.2f}×",
        "–" if row.peak_bytes is None else human_bytes(row.peak_bytes),
    ]


def _times(value: float) -> str:
    return "–" if value == 1 else f"{value:.2f}×"


def _spent(bench: Bench) -> Markup | None:
    if not bench.spent:
        return None
    names = [field.name for field in fields(TimeSpent)]
    bars = [
        SpentBar(f"{network}, {mode}", [getattr(spent, name) for name in names])
        for mode, network, spent in bench.spent
    ]
    keys = [
        element("li", element("i", class_=f"key {style}"), name)
        for name, style in zip(names, PART_CLASSES, strict=True)
    ]
    return element(
        "figure",
        element("h3", "Where the time of a call goes, in milliseconds"),
        both_widths(lambda width: spent_chart(bars, names, width)),
        element("ul", *keys, class_="legend"),
        element(
            "p",
            "Of calls apart from those in the table, at its first batch size, in shares that a "
            "profiler found.",
            class_="note",
        ),
        class_="drawing",
    )
