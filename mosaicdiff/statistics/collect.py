"""Statistics of linears in every stage, as a request asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..distributed import World
from ..groups import Denoiser
from ..request import Job
from ..runtime import StagedDenoiser
from .bank import HessianBank
from .calibration import PackedStatistics
from .capture import evaluating
from .noising import collect_statistics
from .sampled import sample_statistics

#: Called with (what is being done, how much is done, how much there is).
Progress = Callable[[str, int, int], None]


#: Statistics of each stage, by linear.
Collected = Sequence[Mapping[str, PackedStatistics]]


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
            stage; `trajectory` its pipeline on its prompts, with the weights of its steps.
        network: the dense denoiser, or a staged one made from it, of which stage k runs
            `stage_models[k]`; in a run of the pipeline it takes the denoiser's place.
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
        Exception: of the pipeline, see `sample_statistics`.
    """
    peak = peak or Peak()
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError(
            "collect: network must hold its weights, but some are on the meta device, as after "
            "enable_sequential_cpu_offload(). Use enable_model_cpu_offload()."
        )
    if job.config.activations == "noised":
        return _collect_noised(job, network, widths, tell, what, peak)
    stages = job.frame.division.stages
    banks = [HessianBank(widths) for _ in stages]
    with evaluating(job.denoiser), evaluating(network):
        drawn = sample_statistics(
            job, network, banks, widths, lambda done, total: tell(what, done, total)
        )
    if network is job.denoiser and not job.sampled.batches:
        job.sampled.batches.extend(drawn)
    device = job.device
    for bank in banks:
        bank.add_up(World.current(), device)
    kept = 2 if device.type == "cpu" else 1  # the sums before the last batch are in main memory
    peak.see(kept * sum(bank.nbytes for bank in banks))
    pairs = zip(banks, stages, strict=True)
    return [finish(bank, widths, stage.name) for bank, stage in pairs]


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
            bank.add_up(World.current(), job.device)
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
