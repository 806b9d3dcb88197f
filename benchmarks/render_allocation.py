"""Tables and the front of `bench_allocation`, for `render`."""

import statistics
from pathlib import Path

from benchmarks.rows import RESULTS, read_rows

#: Label, colour and line of each allocation that the front draws.
DRAWN = {
    "equal": ("equal in all stages and layers", "#8C8C8C", "v:"),
    "score": ("by score (MosaicDiff)", "#DD8452", "s--"),
    "one network, optimal": ("optimal, one network", "#4C72B0", "^--"),
    "search from score": ("evolutionary from score (Diff-ES)", "#8172B3", "D:"),
    "search from optimal": ("evolutionary from optimal", "#55A868", "d-"),
    "optimal": ("optimal (default)", "#C44E52", "o-"),
}


def rows_of(part: str) -> list[dict[str, str]]:
    return [r for r in read_rows(RESULTS / "allocation.csv") if r["part"] == part]


def grouped() -> dict[tuple[str, float], list[dict[str, str]]]:
    """Rows of the table by allocation and sparsity; the dense ones at sparsity 0."""
    groups: dict[tuple[str, float], list[dict[str, str]]] = {}
    for row in rows_of("table"):
        groups.setdefault((row["allocation"], float(row["sparsity"])), []).append(row)
    return groups


def mean_of(rows: list[dict[str, str]], name: str) -> float:
    return statistics.mean(float(row[name]) for row in rows)


def spread_of(rows: list[dict[str, str]], name: str, digits: int) -> str:
    values = [float(row[name]) for row in rows]
    return (
        f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"
    )


def allocation_table() -> str:
    """One line an allocation, one column a sparsity: distance, error, accuracy; means."""
    groups = grouped()
    sparsities = sorted({s for _, s in groups if s > 0})
    lines = [
        "| allocation | " + " | ".join(f"{s:.0%}" for s in sparsities) + " | time to prune |",
        "|---|" + "---|" * (len(sparsities) + 1),
    ]
    dense = groups["dense", 0.0]
    lines.append(
        f"| dense | {mean_of(dense, 'frechet'):.2f} / 0 / {mean_of(dense, 'accuracy'):.1%} |"
        + " |" * len(sparsities)
    )
    for name in dict.fromkeys(n for n, s in groups if s > 0):
        cells, seconds = [], []
        for s in sparsities:
            rows = groups.get((name, s), [])
            cells.append(
                f"{mean_of(rows, 'frechet'):.2f} / {_short(mean_of(rows, 'mse_to_dense'))} / "
                f"{mean_of(rows, 'accuracy'):.1%}"
                if rows
                else ""
            )
            seconds += [float(row["prune_seconds"]) for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.median(seconds):.1f} s |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.5f}".lstrip("0")


def goal_table() -> str:
    """The goal: `optimal` at 50% beside `score` at 30%, with the range over the seeds."""
    groups = grouped()
    lines = ["| | Frechet distance | squared error |", "|---|---|---|"]
    for name, s in (("dense", 0.0), ("score", 0.3), ("optimal", 0.3), ("optimal", 0.5)):
        rows = groups[name, s]
        label = name if s == 0 else f"{name}, {s:.0%}"
        error = "0" if s == 0 else spread_of(rows, "mse_to_dense", 4)
        lines.append(f"| {label} | {spread_of(rows, 'frechet', 2)} | {error} |")
    return "\n".join(lines)


def stages_table() -> str:
    """Stages by the data beside the closed form: predicted and measured error, means of seeds."""
    rows = rows_of("stages")
    sparsities = sorted({float(r["sparsity"]) for r in rows})
    lines = [
        "| stages | boundaries (seed 0) | "
        + " | ".join(f"{s:.0%}: predicted, measured" for s in sparsities) + " |",
        "|---|---|" + "---|" * len(sparsities),
    ]  # fmt: skip
    for name in dict.fromkeys(r["allocation"] for r in rows):
        here = [r for r in rows if r["allocation"] == name]
        cells = []
        for s in sparsities:
            found = [r for r in here if float(r["sparsity"]) == s]
            cells.append(
                f"{mean_of(found, 'predicted_error'):.3g}, {mean_of(found, 'latent_error'):.2e}"
                if found
                else ""
            )
        places = next((r["boundaries"] for r in here if r["seed"] == "0"), "")
        lines.append(f"| {name} | {places or '-'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_front(path: Path) -> None:
    """Draw distance and squared error over sparsity, means of the seeds with their range."""
    from matplotlib.figure import Figure

    groups = grouped()
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, (label, colour, style) in DRAWN.items():
        sparsities = sorted(s for n, s in groups if n == name)
        if not sparsities:
            continue
        for axis, measure in zip(axes, ("frechet", "mse_to_dense"), strict=True):
            values = [[float(r[measure]) for r in groups[name, s]] for s in sparsities]
            x = [100 * s for s in sparsities]
            axis.plot(
                x, [statistics.mean(v) for v in values], style, color=colour, ms=5,
                label=label if axis is axes[0] else None,
            )  # fmt: skip
            axis.fill_between(
                x,
                [min(v) for v in values],
                [max(v) for v in values],
                color=colour,
                alpha=0.12,
                lw=0,
            )
    dense = mean_of(groups["dense", 0.0], "frechet")
    axes[0].axhline(dense, color="black", lw=1, label="dense")
    axes[0].set_ylabel("Frechet distance to the data")
    axes[1].set_ylabel("squared error to the dense pictures")
    axes[1].set_yscale("log")
    for axis in axes:
        axis.set_xlabel("prunable MACs removed, mean over 50 steps (%)")
        axis.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)
