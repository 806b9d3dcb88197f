"""What pruning did, by stage and layer, as data and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from .solving.weights import WeightSolution


@dataclass(frozen=True)
class LayerReport:
    """One layer of one stage; `error` is the lost share of the output's energy."""

    name: str
    kind: str
    groups: int
    kept: int
    error: float
    damping: float


@dataclass(frozen=True)
class WeightReport:
    """One linear of one stage that single weights were removed from.

    Args:
        name: of the linear.
        shape: (m, n), which stays.
        removed: share of its weights that are zero.
        error: the lost share of the output's energy.
        damping: that was used, relative to the mean diagonal.
    """

    name: str
    shape: tuple[int, int]
    removed: float
    error: float
    damping: float


@dataclass(frozen=True)
class StageReport:
    """One stage: train timesteps as diffusers counts them, from 0, both ends included.

    `layers` lists all where groups went, `weights` the pruned linears where single weights went.
    `norm_error` is what approximate norms over all heads change of the denoiser's output: the mean
    squared difference to the same kept heads with exact norms, over the latter's mean square.
    """

    name: str
    first_timestep: int
    last_timestep: int
    steps: int
    sparsity: float
    macs: int
    macs_with_attention: int
    layers: list[LayerReport]
    weights: list[WeightReport] = field(default_factory=list)
    norm_error: float | None = None


@dataclass(frozen=True)
class DecisionReport:
    """How it was decided what goes.

    Args:
        allocation: that was used.
        budget: that was asked for.
        reached: in the budget's unit; None where shares were stated.
        predicted_error: the layers' weighted squared errors, summed over the steps.
        measured: what was measured on the way: errors by effort, latencies, a search.
    """

    allocation: str
    budget: str
    reached: float | None
    predicted_error: float
    measured: dict[str, Any]


@dataclass(frozen=True)
class PackagesReport:
    """How the network was calibrated and solved, part after part.

    Args:
        count: of the packages.
        memory: bytes that were allowed; None is no limit.
        expected_bytes: what the largest package was expected to take, beside the model and its
            activations.
        accumulator_bytes: the most that the sums over calibration inputs took, as measured.
    """

    count: int
    memory: int | None
    expected_bytes: int
    accumulator_bytes: int


@dataclass(frozen=True)
class PruneReport:
    """What was done: MACs are of one denoiser call for one sample; pruned ones average the steps.

    `parameters` and `bytes` are what a checkpoint holds, all stages together, in the dtype at
    hand; `resident_bytes` is what the stages take when loaded; `parameters_per_step` is what one
    step uses, averaged over the steps.
    """

    stages: list[StageReport]
    sparsity: float
    latent_power: float
    macs_dense: int
    macs_dense_with_attention: int
    macs: float
    macs_with_attention: float
    parameters_dense: int
    parameters: int
    parameters_per_step: float
    bytes_dense: int
    bytes: int
    resident_bytes: int
    seconds: float
    decision: DecisionReport | None = None
    packages: PackagesReport | None = None
    #: Name of the denoiser in its pipeline.
    component: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)

    @property
    def of_weights(self) -> bool:
        """Whether single weights went and not groups."""
        return any(stage.weights for stage in self.stages)

    def tables(self) -> tuple[Table, Table]:
        """Draw the stages, and what went of each layer or linear."""
        return self.stage_table(), self.weight_table() if self.of_weights else self.layer_table()

    def stage_table(self) -> Table:
        """Draw one line a stage."""
        table = Table(title="stages")
        for column in ("stage", "t (from 1)", "steps", "sparsity", "MACs", "mean error", "damping"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        approximate = any(stage.norm_error is not None for stage in self.stages)
        if approximate:
            table.add_column("norm error", justify="right")
        for stage in self.stages:
            norm_error = [] if not approximate else [f"{stage.norm_error:.2g}"]
            rows: list[LayerReport | WeightReport] = [*stage.layers, *stage.weights]
            errors = [row.error for row in rows]
            table.add_row(
                stage.name,
                f"{stage.first_timestep + 1}..{stage.last_timestep + 1}",
                str(stage.steps),
                f"{stage.sparsity:.1%}",
                f"{stage.macs_with_attention / self.macs_dense_with_attention:.1%}",
                f"{sum(errors) / max(len(errors), 1):.4f}",
                f"{max((row.damping for row in rows), default=0.0):g}",
                *norm_error,
            )
        return table

    def layer_table(self) -> Table:
        """Draw one line a layer: groups kept and error in each stage."""
        table = Table(title="kept of each layer (error of its output)")
        table.add_column("layer", overflow="fold")
        table.add_column("dense", justify="right")
        for stage in self.stages:
            table.add_column(stage.name, justify="right")
        for index, layer in enumerate(self.stages[0].layers):
            cells = [
                f"{stage.layers[index].kept} ({stage.layers[index].error:.3f})"
                for stage in self.stages
            ]
            table.add_row(layer.name, f"{layer.groups} {layer.kind}", *cells)
        return table

    def weight_table(self) -> Table:
        """Draw one line a linear that lost single weights: share removed and error by stage."""
        table = Table(title="weights removed of each linear (error of its output)")
        table.add_column("linear", overflow="fold")
        table.add_column("shape", justify="right")
        for stage in self.stages:
            table.add_column(stage.name, justify="right")
        rows = [{row.name: row for row in stage.weights} for stage in self.stages]
        shapes = {name: row.shape for named in rows for name, row in named.items()}
        for name, (m, n) in shapes.items():
            found = [named.get(name) for named in rows]
            cells = ["whole" if r is None else f"{r.removed:.1%} ({r.error:.3f})" for r in found]
            table.add_row(name, f"{m} x {n}", *cells)
        return table


def weight_rows(solved: Mapping[str, WeightSolution]) -> list[WeightReport]:
    """Describe the pruned linears of one stage, in the order given."""
    return [
        WeightReport(
            name=name,
            shape=(solution.mask.shape[0], solution.mask.shape[1]),
            removed=float((~solution.mask).double().mean()),
            error=solution.error,
            damping=solution.damping,
        )
        for name, solution in solved.items()
    ]


def report_from_dict(values: dict[str, Any]) -> PruneReport:
    """Build a report from what `to_dict` gave."""
    stages = [
        StageReport(
            **{
                **stage,
                "layers": [LayerReport(**row) for row in stage["layers"]],
                "weights": [
                    WeightReport(**{**row, "shape": tuple(row["shape"])})
                    for row in stage.get("weights", [])
                ],
            }
        )
        for stage in values["stages"]
    ]
    decision = values.get("decision")
    made = None if decision is None else DecisionReport(**decision)
    packages = values.get("packages")
    split = None if packages is None else PackagesReport(**packages)
    return PruneReport(**{**values, "stages": stages, "decision": made, "packages": split})
