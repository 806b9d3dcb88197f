"""The table of `bench_guidance`, for `render`."""

from benchmarks.rows import RESULTS, read_rows


def guidance_table() -> str:
    """One line a guidance, one column a model; what is best of its model is bold."""
    rows = read_rows(RESULTS / "guidance.csv")
    models = sorted({float(row["sparsity"]) for row in rows})
    scales = sorted({float(row["guidance"]) for row in rows})
    best = {
        model: min(float(r["frechet"]) for r in rows if float(r["sparsity"]) == model)
        for model in models
    }
    lines = [
        "| guidance | "
        + " | ".join("dense" if m == 0 else f"{m:.0%} pruned" for m in models)
        + " |",
        "|---|" + "---|" * len(models),
    ]
    for scale in scales:
        cells = []
        for model in models:
            found = [
                r for r in rows if float(r["sparsity"]) == model and float(r["guidance"]) == scale
            ]
            cells.append(_cell(found[0], best[model]) if found else "")
        lines.append(f"| {scale:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, str], best: float) -> str:
    distance = float(row["frechet"])
    said = f"{distance:.2f}" if distance > best else f"**{distance:.2f}**"
    shares = (f"{float(row[name]):.0%}" for name in ("precision", "recall"))
    parts = [said, *shares, f"{float(row['inception_score']):.2f}"]
    return " / ".join(parts)
