"""What a report shows, as plain values: no model, no tensors but the pictures' bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..evaluate.bench import BenchRow
from ..evaluate.evaluation import Evaluation
from ..evaluate.spent import TimeSpent
from ..memory.count import StatedMemory
from ..report import PruneReport


@dataclass(frozen=True)
class ShownStage:
    """One stage; what its report did not say is None.

    Args:
        name: of it.
        first: its cleanest train timestep, counted from 1 as in the papers.
        last: its noisiest.
        steps: sampling steps in the plan.
        sparsity: share of the prunable MACs removed, or of the weights.
        macs: attention products included, over those of the dense model.
        error: mean over its layers.
    """

    name: str
    first: int
    last: int
    steps: int
    sparsity: float | None
    macs: float | None
    error: float | None


@dataclass(frozen=True)
class ShownLayer:
    """One layer, or one linear that lost single weights, over the stages.

    Args:
        name: full name.
        block: name of the block that holds it.
        part: what is left of the name within the block.
        kind: `heads`, `neurons` or `weights`.
        groups: of the dense layer.
        kept: groups kept in each stage.
        indices: which, for each stage; None where all or where it is weights.
        errors: lost share of the output's energy in each stage; None where it is not known.
    """

    name: str
    block: str
    part: str
    kind: str
    groups: int
    kept: tuple[int, ...]
    indices: tuple[frozenset[int] | None, ...]
    errors: tuple[float | None, ...]


@dataclass(frozen=True)
class ScoreCurve:
    """The score of the timesteps, by which stages are divided unless that was asked otherwise.

    Args:
        timesteps: counted from 1.
        score: of each.
        gain: its part that is the normalised gain of error.
        threshold: score at which the middle stage begins; None where stages come from elsewhere.
        origin: where the boundaries come from, in words.
    """

    timesteps: tuple[float, ...]
    score: tuple[float, ...]
    gain: tuple[float, ...]
    threshold: float | None
    origin: str


@dataclass(frozen=True)
class Network:
    """One pruned denoiser of the pipeline.

    Args:
        component: its name in the pipeline.
        kind: class of the dense denoiser.
        stages: noisiest first.
        layers: in the model's order.
        curve: None where the scheduler gives none.
        memory: bytes it takes on disk and loaded, by count.
        report: of the pruning; None where the checkpoint holds none.
        config: that it was pruned with.
        source: what it was pruned from, or None.
    """

    component: str
    kind: str
    stages: tuple[ShownStage, ...]
    layers: tuple[ShownLayer, ...]
    curve: ScoreCurve | None
    memory: StatedMemory
    report: PruneReport | None
    config: Mapping[str, Any]
    source: str | None

    @property
    def of_weights(self) -> bool:
        """Whether single weights went and not groups."""
        return any(layer.kind == "weights" for layer in self.layers)


@dataclass(frozen=True)
class Sheet:
    """Pictures of one model at one guidance, in one image.

    Args:
        model: `dense` or `pruned`.
        guidance: scale, or None for the pipeline's own.
        png: the image.
        columns: pictures side by side.
        count: pictures.
        cell: width and height of one with the gap around it, in pixels of the image.
        shrunk_from: width and height of a picture as sampled; None where it is as it was.
        frame: of a video, which was taken; None for pictures.
    """

    model: str
    guidance: float | None
    png: bytes
    columns: int
    count: int
    cell: tuple[int, int]
    shrunk_from: tuple[int, int] | None = None
    frame: int | None = None


@dataclass(frozen=True)
class Bench:
    """What `mosaicdiff bench` measured of the denoiser alone.

    Args:
        model: that was timed.
        machine: device, type, threads, rounds and versions, by name.
        rows: of each network, mode, batch size and number of steps.
        spent: (mode, network) and where the time of a call went.
    """

    model: str
    machine: Mapping[str, str]
    rows: tuple[BenchRow, ...]
    spent: tuple[tuple[str, str, TimeSpent], ...]


@dataclass(frozen=True)
class Page:
    """All that a report shows.

    Args:
        model: the pruned model, as it was named.
        networks: its pruned denoisers.
        evaluation: dense beside pruned.
        sheets: pictures of both, by guidance in the order of the evaluation.
        command: that writes this page again; empty where it was called from Python.
        bench: of its denoiser, or None.
    """

    model: str
    networks: tuple[Network, ...]
    evaluation: Evaluation
    sheets: tuple[Sheet, ...]
    command: str = ""
    bench: Bench | None = None
