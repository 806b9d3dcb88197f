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


def _seeds(rows: list[dict[str, str]]) -> int:
    return len({row["seed"] for row in rows})


def _dense(part: str) -> str:
    rows = [row for row in rows_of(part) if row["variant"] == "dense"]
    return f"{mean_of(rows, 'frechet'):.2f} / 0 / {mean_of(rows, 'accuracy'):.1%}"


def criteria_table() -> str:
    """One line a criterion and granularity, one column a sparsity or pattern."""
    rows = rows_of("table")
    lines = []
    for granularities in (("structured",), ("unstructured", *PATTERNS)):
        here = [row for row in rows if row["granularity"] in granularities]
        columns = sorted(
            {(row["granularity"], float(row["sparsity"])) for row in here},
            key=lambda column: (granularities.index(column[0]), column[1]),
        )
        heads = [f"{s:.0%}" if name not in PATTERNS else name for name, s in columns]
        lines += [
            f"| {granularities[0]} | " + " | ".join(heads) + " |",
            "|---|" + "---|" * len(heads),
            f"| dense | {_dense('table')} |" + " |" * (len(heads) - 1),
        ]
        for criterion in dict.fromkeys(row["criterion"] for row in here):
            cells = [
                _cell(
                    [
                        row
                        for row in here
                        if row["criterion"] == criterion
                        and (row["granularity"], float(row["sparsity"])) == column
                    ]
                )
                for column in columns
            ]
            lines.append(f"| {criterion} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def variants_table(part: str) -> str:
    """One line a variant, one column a granularity and sparsity."""
    rows = [row for row in rows_of(part) if row["variant"] != "dense"]
    columns = list(dict.fromkeys((row["granularity"], float(row["sparsity"])) for row in rows))
    lines = [
        "| | " + " | ".join(f"{name}, {s:.0%}" for name, s in columns) + " |",
        "|---|" + "---|" * len(columns),
        f"| dense | {_dense(part)} |" + " |" * (len(columns) - 1),
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = [
            _cell(
                [
                    row
                    for row in rows
                    if row["variant"] == variant
                    and (row["granularity"], float(row["sparsity"])) == column
                ]
            )
            for column in columns
        ]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def packages_table() -> str:
    """Quality on `digits` beside the time and memory of a wider model, by number of packages."""
    rows, wide = rows_of("packages"), {row["variant"]: row for row in rows_of("memory")}
    columns = list(
        dict.fromkeys(
            (row["granularity"], float(row["sparsity"]))
            for row in rows
            if row["variant"] != "dense"
        )
    )
    lines = [
        "| | " + " | ".join(f"digits, {name}, {s:.0%}" for name, s in columns)
        + " | time, digits | sums, digits | time, DiT-B/4 | sums | process |",
        "|---|" + "---|" * (len(columns) + 5),
    ]  # fmt: skip
    for variant in dict.fromkeys(row["variant"] for row in rows if row["variant"] != "dense"):
        here = [row for row in rows if row["variant"] == variant]
        cells = [
            _cell([r for r in here if (r["granularity"], float(r["sparsity"])) == column])
            for column in columns
        ]
        first = [row for row in here if row["granularity"] == "structured"]
        seconds = statistics.median(float(row["prune_seconds"]) for row in first)
        cells += [f"{seconds:.1f} s", _megabytes(first[0]["accumulator_bytes"])]
        if variant in wide:
            row = wide[variant]
            cells += [
                f"{float(row['prune_seconds']):.0f} s",
                _megabytes(row["accumulator_bytes"]),
                _megabytes(row["peak_bytes"]),
            ]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _megabytes(text: str) -> str:
    return f"{float(text) / 1e6:.3g} MB"


def seeds_of(part: str) -> int:
    """Return how many seeds every row of a part has, at least."""
    groups: dict[tuple, list[dict[str, str]]] = {}
    for row in rows_of(part):
        key = tuple(row[name] for name in ("variant", "granularity", "sparsity", "criterion"))
        groups.setdefault(key, []).append(row)
    return min(map(_seeds, groups.values()))


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
