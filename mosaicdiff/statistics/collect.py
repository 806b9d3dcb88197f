"""Statistics of linears in every stage, as a request asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..distributed import World
from ..groups import Denoiser
from ..request import Job
from ..runtime import StagedDenoiser
from .bank import HessianBank
from .calibration import PackedStatistics
from .capture import evaluating
from .noising import collect_statistics

#: Called with (what is being done, how much is done, how much there is).
Progress = Callable[[str, int, int], None]


@dataclass
class Peak:
    """The most bytes that sums took at one time."""

    bytes: int = 0

    def see(self, count: int) -> None:
        """Hear of what they take now."""
        self.bytes = max(self.bytes, count)


def collect(
    job: Job,
    network: Denoiser,
    widths: Mapping[str, int],
    tell: Progress,
    what: str = "calibrate",
    peak: Peak | None = None,
) -> list[dict[str, PackedStatistics]]:
    """Run a network as the request says and return the statistics of linears' inputs.

    Args:
        job: the request. `activations="noised"` runs its clean latents, noised within each
            stage.
        network: the dense denoiser, or a staged one made from it, of which stage k runs
            `stage_models[k]`.
        widths: input features of the linears, by name in the dense denoiser. The network must
            still hold the dense denoiser's own module objects for them.
        tell: hears how far it is.
        what: that is done, for `tell`.
        peak: hears what the sums take.

    Returns:
        For each stage of `job.frame.division`, the statistics of every linear by name.

    Raises:
        ValueError: there is nothing to run, or a linear saw no sample, or something that is not
            finite, in a stage.
    """
    return _collect_noised(job, network, widths, tell, what, peak or Peak())


def _collect_noised(
    job: Job, network: Denoiser, widths: Mapping[str, int], tell: Progress, what: str, peak: Peak
) -> list[dict[str, PackedStatistics]]:
    data = job.require_data("calibration")
    stages = job.frame.division.stages
    total, done = len(stages) * job.config.samples, 0
    statistics = []
    with evaluating(job.denoiser), evaluating(network):
        for k, stage in enumerate(stages):

            def advance(rows: int, name: str = stage.name) -> None:
                nonlocal done
                done += rows
                tell(f"{what} {name}", done, total)

            runs = network.stage_models[k] if isinstance(network, StagedDenoiser) else network
            bank = collect_statistics(
                job.denoiser, job.adapter, widths, stage, job.frame.schedule, data, job.config,
                advance, runs,
            )  # fmt: skip
            bank.add_up(World.current(), next(job.denoiser.parameters()).device)
            peak.see(bank.nbytes)
            statistics.append(finish(bank, widths, stage.name))
    return statistics


def finish(bank: HessianBank, widths: Mapping[str, int], stage: str) -> dict[str, PackedStatistics]:
    """Turn the sums of one stage into packed statistics, one linear after the other.

    Raises:
        ValueError: names the linear and the stage of which nothing, or nothing finite, was seen.
    """
    packed = {}
    for name in widths:
        try:
            packed[name] = PackedStatistics.pack(bank.finalize(name))
        except ValueError as error:
            raise ValueError(f"{error} (Stage {stage}.)") from None
    return packed
