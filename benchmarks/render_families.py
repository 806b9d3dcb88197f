"""Tables of `bench_families` and `bench_flow`, for `render`."""

from benchmarks.rows import RESULTS, read_rows

_CARDS = ("24", "48", "80")


def families_table() -> str:
    """One line a model: dense, its stages at 30%, what calibrating takes, packages a card."""
    rows = read_rows(RESULTS / "families.csv")
    lines = [
        "| model | dense: parameters, MACs | MACs left: early / middle / late (their steps), "
        "mean | sums of a stage, elimination | packages in 24 / 48 / 80 GB |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        sizes = {r["network"]: r for r in rows if r["model"] == name and r["part"] == "size"}
        memory = next(r for r in rows if r["model"] == name and r["part"] == "memory")
        dense = sizes["dense"]
        whole = float(dense["macs_with_attention"])
        stages = [k for k in sizes if k not in ("dense", "mean of the steps")]
        left = [f"{float(sizes[k]['macs_with_attention']) / whole:.0%}" for k in stages]
        steps = " / ".join(sizes[k]["steps"] for k in stages)
        mean = float(sizes["mean of the steps"]["macs_with_attention"]) / whole
        sums, work = (float(memory[k]) / 2**30 for k in ("sums_bytes", "elimination_bytes"))
        packages = " / ".join(memory[f"packages_{card}"] for card in _CARDS)
        lines.append(
            f"| {name} | {float(dense['parameters']) / 1e9:.2f} G, {_tera(whole)} | "
            f"{' / '.join(left)} ({steps}), {mean:.0%} | {sums:.1f}, {work:.1f} GiB | {packages} |"
        )
    return "\n".join(lines)


def _tera(macs: float) -> str:
    return f"{macs / 1e12:.3g} T"


def flow_table() -> str:
    """Quality of the flow-matching digits at 30%, by stages, a column an allocation."""
    rows = [r for r in read_rows(RESULTS / "flow.csv") if r["part"] == "quality"]
    dense = next(r for r in rows if r["rule"] == "dense")
    kinds = list(dict.fromkeys(r["allocation"] for r in rows if r["allocation"]))
    lines = [
        "| stages | " + " | ".join(f"`{kind}`" for kind in kinds) + " |",
        "|---|" + "---|" * len(kinds),
        f"| dense | {float(dense['frechet']):.2f} / 0 |" + " |" * (len(kinds) - 1),
    ]
    for rule in dict.fromkeys(r["rule"] for r in rows if r is not dense):
        found = {r["allocation"]: r for r in rows if r["rule"] == rule}
        cells = [
            f"{float(found[k]['frechet']):.2f} / {float(found[k]['mse_to_dense']):.4f}"
            for k in kinds
        ]
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
