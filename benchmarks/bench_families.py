"""What pruning published denoisers takes and saves, counted on the meta device: no weights needed.

    python -m benchmarks.bench_families                 # all of them
    python -m benchmarks.bench_families flux-dev sdxl

Rows go to `benchmarks/results/families.csv`: parameters and MACs (of one call at the native size,
without and with attention products) dense and at 30%, in the stages that the score gives; bytes
that the sums of a calibration and the widest elimination take on a GPU beside the model and its
activations; and how many packages that makes on cards of 24, 48 and 80 GB which hold the model in
16 bits. `-` says that the model alone does not fit.
"""

import argparse

from benchmarks.rows import RESULTS, provenance, upsert_row
from mosaicdiff import PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.evaluate.configurations import CONFIGURATIONS, configuration, random_staged
from mosaicdiff.packages.memory import MemoryModel, make_packages
from mosaicdiff.packages.units import layer_units

FILE = RESULTS / "families.csv"
NAMES = ("dit-xl-2", "sdxl", "sd3.5-large", "flux-dev", "wan-2.1-14b")
CARDS = (24, 48, 80)
#: As `mosaicdiff prune` has it: three stages by the score, each giving by its own.
PLAN = PruneConfig(sparsity=0.3, allocation="score")


def size_rows(name: str) -> list[dict[str, object]]:
    """Count parameters and MACs, dense and of each stage."""
    dense = configuration(name).empty()
    adapter = adapter_for(dense)
    staged = random_staged(dense, PLAN)
    networks = [("dense", "", dense)]
    stages = zip(staged.division.stages, staged.info.steps, staged.stage_models, strict=True)
    networks += [(stage.name, steps, model) for stage, steps, model in stages]
    rows = []
    for label, steps, model in networks:
        macs = adapter.macs(model)
        parameters = sum(p.numel() for p in model.parameters())
        rows.append(
            {"part": "size", "model": name, "network": label, "steps": steps,
             "parameters": parameters, "macs": macs.linear, "macs_with_attention": macs.total}
        )  # fmt: skip
    linear, total = staged.mean_macs()
    rows.append(
        {"part": "size", "model": name, "network": "mean of the steps",
         "steps": sum(staged.info.steps),
         "parameters": "", "macs": round(linear), "macs_with_attention": round(total)}
    )  # fmt: skip
    return rows


def memory_rows(name: str) -> list[dict[str, object]]:
    """Count what calibrating and eliminating takes, and the packages for each card."""
    dense = configuration(name).empty()
    units = layer_units(dense, adapter_for(dense).layers(dense))
    weights = 2 * sum(p.numel() for p in dense.parameters())
    rows = []
    for label, model in (
        ("one stage at a time", MemoryModel(stages=3, at_once=False, together=False)),
        ("three stages along trajectories", MemoryModel(stages=3, at_once=True, together=False)),
    ):
        row = {
            "part": "memory", "model": name, "network": label, "weights_bytes": weights,
            "sums_bytes": model.accumulators(units),
            "elimination_bytes": max(unit.workspace for unit in units),
        }  # fmt: skip
        for card in CARDS:
            room = card * 2**30 - weights
            row[f"packages_{card}"] = "-"
            if room >= max(model.package([unit]) for unit in units):
                row[f"packages_{card}"] = len(make_packages(units, "auto", room, model))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CONFIGURATIONS)}")
    for name in parser.parse_args().names or NAMES:
        for row in (*size_rows(name), *memory_rows(name)):
            upsert_row(FILE, ("part", "model", "network"), row | provenance())
            print({key: value for key, value in row.items() if value != ""})


if __name__ == "__main__":
    main()
