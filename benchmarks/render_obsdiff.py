"""Tables of `bench_obsdiff`, for `render`."""

import statistics
from pathlib import Path

from benchmarks.render_allocation import mean_of
from benchmarks.rows import RESULTS, read_rows

PATTERNS = ("2:4", "4:8", "1:4")


def rows_of(part: str) -> list[dict[str, str]]:
    return [row for row in read_rows(RESULTS / "obsdiff.csv") if row["part"] == part]


def _cell(rows: list[dict[str, str]]) -> str:
    """Frechet distance / squared error to dense / accuracy, means of the seeds."""
    if not rows:
        return ""
    error = f"{mean_of(rows, 'mse_to_dense'):.4f}".lstrip("0")
    return f"{mean_of(rows, 'frechet'):.2f} / {error} / {mean_of(rows, 'accuracy'):.1%}"


def _dense(part: str) -> str:
    rows = [row for row in rows_of(part) if row["variant"] == "dense"]
    return f"{mean_of(rows, 'frechet'):.2f} / 0 / {mean_of(rows, 'accuracy'):.1%}"


def _column(row: dict[str, str]) -> tuple[str, float]:
    return row["granularity"], float(row["sparsity"])


def _line(label: str, rows: list[dict[str, str]], columns: list[tuple[str, float]]) -> str:
    """Write one line of a table: the rows of each column in a cell."""
    cells = [_cell([row for row in rows if _column(row) == column]) for column in columns]
    return f"| {label} | {' | '.join(cells)} |"


def _head(label: str, heads: list[str], part: str) -> list[str]:
    """Write a table's head, and the dense model's line."""
    return [
        f"| {label} | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
        f"| dense | {_dense(part)} |" + " |" * (len(heads) - 1),
    ]


def criteria_table() -> str:
    """One line a criterion and granularity, one column a sparsity or pattern."""
    rows = rows_of("table")
    lines = []
    for granularities in (("structured",), ("unstructured", *PATTERNS)):
        here = [row for row in rows if row["granularity"] in granularities]
        columns = sorted(
            {_column(row) for row in here},
            key=lambda column: (granularities.index(column[0]), column[1]),
        )
        heads = [f"{s:.0%}" if name not in PATTERNS else name for name, s in columns]
        lines += _head(granularities[0], heads, "table")
        for criterion in dict.fromkeys(row["criterion"] for row in here):
            found = [row for row in here if row["criterion"] == criterion]
            lines.append(_line(criterion, found, columns))
        lines.append("")
    return "\n".join(lines).rstrip()


def _variants(part: str) -> tuple[dict[str, list[dict[str, str]]], list[tuple[str, float]]]:
    """Return the rows of each variant of a part, and the columns that they fill."""
    rows = [row for row in rows_of(part) if row["variant"] != "dense"]
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    return groups, list(dict.fromkeys(map(_column, rows)))


def variants_table(part: str) -> str:
    """One line a variant, one column a granularity and sparsity."""
    groups, columns = _variants(part)
    lines = _head("calibration", [f"{name}, {s:.0%}" for name, s in columns], part)
    return "\n".join([*lines, *(_line(name, rows, columns) for name, rows in groups.items())])


def packages_table() -> str:
    """Quality on `digits` beside the time and memory of a wider model, by number of packages."""
    groups, columns = _variants("packages")
    wide = {row["variant"]: row for row in rows_of("memory")}
    heads = [f"digits, {name}, {s:.0%}" for name, s in columns]
    heads += ["time, digits", "sums, digits", "time, DiT-B/4", "sums", "process"]
    lines = ["| packages | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for variant, rows in groups.items():
        first = [row for row in rows if row["granularity"] == "structured"]
        seconds = statistics.median(float(row["prune_seconds"]) for row in first)
        cells = [f"{seconds:.1f} s", _megabytes(first[0]["accumulator_bytes"])]
        if variant in wide:
            row = wide[variant]
            cells.append(f"{float(row['prune_seconds']):.0f} s")
            cells += [_megabytes(row[name]) for name in ("accumulator_bytes", "peak_bytes")]
        lines.append(f"{_line(variant, rows, columns)} {' | '.join(cells)} |")
    return "\n".join(lines)


def _megabytes(text: str) -> str:
    count = float(text) / 1e6
    return f"{count:.0f} MB" if count >= 100 else f"{count:.3g} MB"


#: Label, colour and line of each criterion that is drawn.
DRAWN = {
    "obs": ("OBS, compensated", "#C44E52", "o-"),
    "dsnot": ("DSnoT", "#DD8452", "s--"),
    "wanda": ("Wanda", "#55A868", "v:"),
    "magnitude": ("magnitude", "#8172B3", "D:"),
}


def draw_criteria(path: Path) -> None:
    """Draw distance over sparsity by criterion, groups beside single weights; means of seeds."""
    from matplotlib.figure import Figure

    rows = rows_of("table")
    dense = mean_of([row for row in rows if row["variant"] == "dense"], "frechet")
    figure = Figure(figsize=(9, 4.0), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"structured": "heads and FFN neurons", "unstructured": "single weights"}
    for axis, (granularity, title) in zip(axes, titles.items(), strict=True):
        for criterion, (label, colour, style) in DRAWN.items():
            groups: dict[float, list[float]] = {}
            for row in rows:
                if row["granularity"] == granularity and row["criterion"] == criterion:
                    groups.setdefault(float(row["sparsity"]), []).append(float(row["frechet"]))
            if not groups:
                continue
            x = sorted(groups)
            percent = [100 * s for s in x]
            means = [statistics.mean(groups[s]) for s in x]
            axis.plot(percent, means, style, color=colour, ms=5, label=label)
            axis.fill_between(
                percent, [min(groups[s]) for s in x], [max(groups[s]) for s in x],
                color=colour, alpha=0.12, lw=0,
            )  # fmt: skip
        axis.axhline(dense, color="black", lw=1, label="dense")
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("removed (%)")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("Frechet distance to the data")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=130)
