"""Write the README's tables and figures from the rows in `benchmarks/results`.

python -m benchmarks.render
"""

import argparse
import statistics
from pathlib import Path

from benchmarks import (
    render_allocation,
    render_composition,
    render_families,
    render_guidance,
    render_obsdiff,
)
from benchmarks.rows import RESULTS, read_rows

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FIGURES = ROOT / "docs" / "figures"
NAMES = ("criterion", "compensation", "allocation")
DRAWN = {
    ("obs", "plain", "score"): ("staged OBS, by score", "#C44E52", "o-"),
    ("obs", "plain", "equal"): ("staged OBS, equal stages", "#DD8452", "s--"),
    ("obs", "plain", "one network"): ("OBS, one network", "#4C72B0", "^--"),
    ("wanda", "none", "one network"): ("Wanda, one network", "#55A868", "v:"),
    ("magnitude", "none", "one network"): ("magnitude, one network", "#8172B3", "D:"),
}


def quality_rows(images: int) -> list[dict[str, str]]:
    return [r for r in read_rows(RESULTS / "quality.csv") if int(r["images"]) == images]


def factors_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in NAMES)


def default_cap() -> str:
    from mosaicdiff import PruneConfig

    return f"{PruneConfig.max_sparsity:g}"


def factor_table() -> str:
    """One line a variant, one column a sparsity: distance, error, accuracy."""
    rows = quality_rows(512)
    dense = next(r for r in rows if r["criterion"] == "dense")
    rows = [r for r in rows if r["max_sparsity"] == default_cap()]
    sparsities = sorted({float(r["sparsity"]) for r in rows} & {0.1, 0.2, 0.3, 0.5})
    lines = [
        "| criterion | compensation | allocation | "
        + " | ".join(f"{s:.0%}" for s in sparsities) + " |",
        "|---|---|---|" + "---|" * len(sparsities),
        "| dense | | | " + " | ".join(_cell(dense) for _ in sparsities[:1])
        + " |" + " |" * (len(sparsities) - 1),
    ]  # fmt: skip
    for factors in dict.fromkeys(factors_of(r) for r in rows):
        cells = []
        for s in sparsities:
            found = [r for r in rows if factors_of(r) == factors and float(r["sparsity"]) == s]
            cells.append(_cell(found[0]) if found else "")
        lines.append("| " + " | ".join((*factors, *cells)) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, str]) -> str:
    return (
        f"{float(row['frechet']):.2f} / {_short(float(row['mse_to_dense']))} / "
        f"{float(row['accuracy']):.1%}"
    )


def _short(value: float) -> str:
    return f"{value:.4f}".lstrip("0") if value else "0"


def headline_table() -> str:
    """Means over the seeds with their range."""
    rows = quality_rows(2000)
    lines = [
        "| model | guidance | Frechet distance | gap to dense | squared error | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for guidance in sorted({r["guidance"] for r in rows}):
        here = [r for r in rows if r["guidance"] == guidance]
        dense = {r["seed"]: float(r["frechet"]) for r in here if r["criterion"] == "dense"}
        for factors in dict.fromkeys(factors_of(r) for r in here):
            group = [r for r in here if factors_of(r) == factors]
            gaps = [float(r["frechet"]) - dense[r["seed"]] for r in group]
            accuracy = _spread([100 * float(r["accuracy"]) for r in group])
            distance = _spread([float(r["frechet"]) for r in group])
            error = _spread([float(r["mse_to_dense"]) for r in group], 4)
            if factors[0] == "dense":
                lines.append(f"| dense | {guidance} | {distance} | | | {accuracy}% |")
            else:
                lines.append(
                    f"| {', '.join(factors)} | {guidance} | {distance} | {_spread(gaps)} | "
                    f"{error} | {accuracy}% |"
                )
    return "\n".join(lines)


def _spread(values: list[float], digits: int = 2) -> str:
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def cap_table() -> str:
    rows = [
        r for r in quality_rows(512)
        if factors_of(r) == ("obs", "plain", "score") and float(r["sparsity"]) >= 0.5
    ]  # fmt: skip
    rows.sort(key=lambda r: (float(r["sparsity"]), float(r["max_sparsity"])))
    lines = [
        "| sparsity | cap | stages get | Frechet distance | squared error | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {float(r['sparsity']):.0%} | {r['max_sparsity']} | {r['shares'].replace(' ', ' / ')} | "
        f"{float(r['frechet']):.2f} | {float(r['mse_to_dense']):.4f} | "
        f"{float(r['accuracy']):.1%} |"
        for r in rows
    ]
    return "\n".join(lines)


def speed_table() -> str:
    lines = [
        "| model | sparsity | neurons kept in | rows | type | mode | dense call | speed-up "
        "| fewer MACs | efficiency | over eager dense |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in read_rows(RESULTS / "speed.csv"):
        device = f"{r['dtype']}, {r['device']}"
        device += f", {r['threads']} threads" if r["device"] == "cpu" else ""
        kept = r["round_to"] if r["round_to"] == "auto" else f"{r['round_to']}s"
        lines.append(
            f"| {r['model']} | {float(r['sparsity']):.0%} | {kept} | {r['batch_size']} | {device} "
            f"| {r['mode']} | {float(r['dense_ms']):.1f} ms | {float(r['speedup']):.3f}x "
            f"| {float(r['macs_ratio']):.3f}x | {float(r['efficiency']):.3f} "
            f"| {float(r['over_eager']):.2f}x |"
        )
    return "\n".join(lines)


def fused_table() -> str:
    """One line a network: operations and time, as diffusers runs it and fused."""
    lines = [
        "| network | operations, views | fused | time | fused | speed-up | distance |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in read_rows(RESULTS / "fused.csv"):
        lines.append(
            f"| {r['model']}, {r['dtype']}, {r['device']} | "
            f"{r['eager_operations']}, {r['eager_views']} | "
            f"{r['fused_operations']}, {r['fused_views']} | {float(r['eager_ms']):.1f} ms | "
            f"{float(r['fused_ms']):.1f} ms | {float(r['speedup']):.2f}x | "
            f"{float(r['distance']):.0e} |"
        )
    return "\n".join(lines)


def draw_quality(path: Path) -> None:
    """Draw distance and squared error over sparsity."""
    from matplotlib.figure import Figure

    rows = quality_rows(512)
    dense = float(next(r for r in rows if r["criterion"] == "dense")["frechet"])
    rows = [r for r in rows if r["max_sparsity"] == default_cap()]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for factors, (label, colour, style) in DRAWN.items():
        found = sorted(
            (r for r in rows if factors_of(r) == factors and float(r["sparsity"]) <= 0.5),
            key=lambda r: float(r["sparsity"]),
        )
        x = [100 * float(r["sparsity"]) for r in found]
        left.plot(x, [float(r["frechet"]) for r in found], style, color=colour, label=label)
        right.plot(x, [float(r["mse_to_dense"]) for r in found], style, color=colour)
    left.axhline(dense, color="black", lw=1, label="dense")
    left.set_ylabel("Frechet distance to the data")
    right.set_ylabel("squared error to the dense pictures")
    for axis in (left, right):
        axis.set_yscale("log")
        axis.set_xlabel("prunable MACs removed, mean over 50 steps (%)")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)


def kernel_table() -> str:
    """Every measured kernel, and its baselines by how many times as long they took."""
    lines = [
        "| device | operation | case | ours | of the floor | error | others: times ours, error |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*.csv")):
        rows = [r for r in read_rows(path) if "operator" in r]
        key = ("device", "threads", "operator", "case", "dtype")
        for group in dict.fromkeys(tuple(r[name] for name in key) for r in rows):
            ours, *others = (r for r in rows if tuple(r[name] for name in key) == group)
            threads = f", threads: {ours['threads']}" if ours["device"] == "cpu" else ""
            beside = "; ".join(
                f"{r['provider']} {float(r['ratio_to_first']):.2f}x{_error(r, ' ')}" for r in others
            )
            lines.append(
                f"| {path.stem}{threads} | `{ours['operator']}` | {ours['case']}, {ours['dtype']} "
                f"| {float(ours['milliseconds']):.4g} ms | {float(ours['floor_fraction']):.0%} "
                f"| {_error(ours)} | {beside} |"
            )
    return "\n".join(lines)


def _error(row: dict[str, str], before: str = "") -> str:
    value = float(row["error"])
    return f"{before}{value:.1e}" if value == value else ""


def error_table() -> str:
    """Layer error over that of re-inversion in rounds, by kind of layer and sparsity."""
    lines = ["| layers | sparsity | geometric mean | least | largest |", "|---|---|---|---|---|"]
    for r in read_rows(RESULTS / "errors.csv"):
        lines.append(
            f"| {r['count']} {r['layers']} | {float(r['sparsity']):.0%} | "
            f"{float(r['ratio_mean']):.3f} | {float(r['ratio_min']):.3f} | "
            f"{float(r['ratio_max']):.3f} |"
        )
    return "\n".join(lines)


def replace_block(text: str, name: str, content: str) -> str:
    """Put content between `<!-- name:begin -->` and `<!-- name:end -->`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"render: README.md must hold {begin} and {end}.")
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    text = README.read_text()
    for name, content in (
        ("goal", render_allocation.goal_table()),
        ("allocation", render_allocation.allocation_table()),
        ("stages", render_allocation.stages_table()),
        ("families", render_families.families_table()),
        ("flow", render_families.flow_table()),
        ("criteria", render_obsdiff.criteria_table()),
        ("inputs", render_obsdiff.variants_table("inputs")),
        ("packages", render_obsdiff.packages_table()),
        ("student", render_obsdiff.variants_table("student")),
        ("headline", headline_table()),
        ("guidance", render_guidance.guidance_table()),
        ("factors", factor_table()),
        ("cap", cap_table()),
        ("composition", render_composition.composition_table()),
        ("speed", speed_table()),
        ("fused", fused_table()),
        ("kernels", kernel_table()),
        ("errors", error_table()),
    ):
        text = replace_block(text, name, content)
    README.write_text(text)
    draw_quality(FIGURES / "quality.png")
    render_allocation.draw_front(FIGURES / "front.png")
    render_obsdiff.draw_criteria(FIGURES / "criteria.png")


if __name__ == "__main__":
    main()
