"""The table of `bench_composition`, for `render`."""

from benchmarks.rows import RESULTS, read_rows


def composition_table() -> str:
    """One line a model and technique: time of a run, speed-up, bytes, error."""
    lines = [
        "| model | technique | time of a run | over the dense model | weights | squared error |",
        "|---|---|---|---|---|---|",
    ]
    for row in read_rows(RESULTS / "composition.csv"):
        technique = f"{row['technique']}, {row['setting']}" if row["setting"] else "as it is"
        lines.append(
            f"| {row['model']} | {technique} | {float(row['seconds']):.2f} s | "
            f"{float(row['speed_up']):.2f}x | {int(row['bytes']) / 1e6:.2f} MB | "
            f"{float(row['error']):.2g} |"
        )
    return "\n".join(lines)
