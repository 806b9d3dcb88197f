"""Calibration along the trajectories of the user's own pipeline, as OBS-Diff calibrates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters.inputs import Condition
from ..batch_errors import in_batch
from ..distributed import World
from ..groups import Denoiser
from ..inputs.joining import joined
from ..inputs.recorder import named_arguments, quiet
from ..runtime import time_scale
from ..trajectory.clock import StageClock
from ..trajectory.weights import step_weights
from .bank import BankSnapshot, HessianBank
from .capture import capture_inputs
from .noising import Batch, CalibrationSet
from .prompts import call_options

if TYPE_CHECKING:
    from ..request import Job

#: Final latents that are kept, at least as many as any measurement draws.
_KEPT_ROWS = 256


@dataclass
class SampledLatents:
    """What the dense pipeline drew, for measurements that need clean latents.

    Args:
        batches: final latents with the conditions that the denoiser was given; empty before.
    """

    batches: list[Batch] = field(default_factory=list)
    _data: CalibrationSet | None = None

    def data(self, job: Job) -> CalibrationSet | None:
        """Return them as clean latents; None before a run."""
        if self._data is None and self.batches:
            self._data = CalibrationSet(self.batches, job.adapter, job.denoiser, drawn=True)
        return self._data


class _SamplerClock(StageClock):
    """A clock that also keeps what the scheduler's last step gave."""

    latents: torch.Tensor | None = None

    def notify(
        self, scheduler: Any, event: str, begin: int | None = None, result: Any = None
    ) -> None:
        super().notify(scheduler, event, begin, result)
        if event == "step":
            self.latents = result[0]


@dataclass
class _Watch:
    """What the calls of the denoiser are told of the run, and what is kept of them."""

    job: Job
    clock: _SamplerClock
    weights: tuple[float, ...]
    #: Called with the step of each denoiser call.
    advance: Callable[[int], None]
    stage: int = 0
    weight: float = 1.0
    #: Position of the batch's first call, and the conditions of the calls there.
    first: int | None = None
    conditions: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def begin(self) -> None:
        """Forget the batch before."""
        self.first, self.conditions, self.clock.latents = None, [], None

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hear of a denoiser call; its place is the scheduler's: guidance makes one or two."""
        given = named_arguments(self.job.denoiser, args, kwargs)
        timestep = given.get(self.job.adapter.timestep_argument[0])
        place = self.clock.place_of_call(timestep)
        if place is None:
            raise RuntimeError(
                f"collect: timestep must be one of the scheduler's, got {timestep}: the pipeline "
                "calls its denoiser out of the scheduler's order, which this does not follow."
            )
        # Samplers with two calls a step have up to twice as many entries as steps.
        step = place.position * len(self.weights) // place.entries
        self.stage, self.weight = place.stage, self.weights[step]
        if self.first is None:
            self.first = place.position
        if place.position == self.first:
            self.conditions.append(self.job.adapter.conditions_of(given))
        self.advance(step)

    def outcome(self, rows: int) -> Batch | None:
        """Return the batch's final latents, with a row for each the denoiser was given.

        Args:
            rows: pictures of the batch. Some pipelines step the guided copies too.
        """
        if self.clock.latents is None or not self.conditions:
            return None
        latents = self.clock.latents[:rows].detach().float().cpu()
        inputs = joined([(call, {}) for call in self.conditions], self.job.adapter.conditions)
        total = min((len(value) for value in inputs.values()), default=rows)
        copies = total // len(latents)
        return latents.repeat(copies, *[1] * (latents.ndim - 1)), inputs


def sample_statistics(
    job: Job,
    network: Denoiser,
    banks: Sequence[HessianBank],
    widths: Mapping[str, int],
    tell: Callable[[int, int], None],
) -> list[Batch]:
    """Run the request's pipeline and add the inputs of linears to the bank of their stage.

    Each token counts by the weight of its step. Batches depend on the seed and their number
    only; several processes share them out, and the sums are of this one's. When this ends,
    however it ends, the pipeline is as it was.

    Args:
        network: the pipeline's denoiser, or a staged one made from it, which takes its place.
        banks: for each stage of `job.frame.division`.
        widths: of the linears, by name in the dense denoiser.
        tell: hears (steps done, steps in all).

    Returns:
        Final latents with the conditions of the denoiser's calls, `_KEPT_ROWS` rows or more
        where so many were sampled.

    Raises:
        Exception: what the pipeline raises in a batch, of the same kind where that can be made
            from a text (else RuntimeError), with the batch's number, which is its `batch` too.
            The banks then hold what they held before that batch.

    Source: OBS-Diff (arXiv 2510.06751).
    """
    config, trajectory, pipeline = job.config, job.config.trajectory, job.pipeline
    if pipeline is None or job.prompts is None:
        raise ValueError(
            "collect: model must be a pipeline with prompts for activations='trajectory', got "
            "a request without."
        )
    options = call_options(type(pipeline).__call__, trajectory)
    weights = step_weights(trajectory.weights, config.steps, trajectory.weight_range)
    groups = list(job.prompts.batches(trajectory.samples, trajectory.batch_size))
    total = len(groups) * config.steps
    wanted = max(_KEPT_ROWS, config.probe_samples)
    kept: dict[str, Batch] = {}  # by number: processes exchange them
    snapshot: list[BankSnapshot] | None = None
    with ExitStack() as stack:
        clock = _SamplerClock(
            job.frame.division, time_scale(job.adapter, job.denoiser.config)
        )  # fmt: skip
        stack.enter_context(quiet(pipeline))
        stack.enter_context(_following(job, clock))
        stack.enter_context(_standing_in(job, network))
        number, world = 0, World.current()
        watch = _Watch(job, clock, weights, lambda step: tell(number * config.steps + step, total))
        hook = network.register_forward_pre_hook(watch.enter, with_kwargs=True)
        stack.callback(hook.remove)

        def receive(name: str, x: torch.Tensor) -> None:
            banks[watch.stage].update(name, x, watch.weight)

        stack.enter_context(capture_inputs(job.denoiser, widths, receive))
        for number, group in enumerate(groups):
            if not world.mine(number):
                continue
            snapshot = _snapshots(banks, snapshot)
            watch.begin()
            try:
                _call(pipeline, job.prompts.argument, group, config.steps, options,
                      config.seed * 1_000_003 + number)  # fmt: skip
            except BaseException as error:
                for bank, before in zip(banks, snapshot, strict=True):
                    bank.restore(before)
                if not isinstance(error, Exception):
                    raise
                raise in_batch(error, "collect", number, len(groups)) from error
            tell((number + 1) * config.steps, total)
            pictures = len(group) * int(options.get("num_images_per_prompt") or 1)
            outcome = watch.outcome(pictures)
            if outcome is not None and _rows(kept.values()) < wanted:
                kept[str(number)] = outcome
    # All processes must measure on what one alone would have kept.
    drawn: list[Batch] = []
    for _, batch in sorted(world.merged(kept).items(), key=lambda item: int(item[0])):
        if _rows(drawn) < wanted:
            drawn.append(batch)
    return _alike(drawn, job.adapter.conditions)


def _alike(batches: list[Batch], conditions: Sequence[Condition]) -> list[Batch]:
    """Pad the texts of all batches to one length: some pipelines pad those of a batch alone."""
    if not batches:
        return []
    whole = joined([(inputs, {}) for _, inputs in batches], conditions)
    found, first = [], 0
    for latents, _ in batches:
        rows = slice(first, first + len(latents))
        found.append((latents, {name: value[rows] for name, value in whole.items()}))
        first += len(latents)
    return found


def _rows(batches: Iterable[Batch]) -> int:
    return sum(len(latents) for latents, _ in batches)


def _snapshots(
    banks: Sequence[HessianBank], before: list[BankSnapshot] | None
) -> list[BankSnapshot]:
    if before is None:
        return [bank.snapshot() for bank in banks]
    return [bank.snapshot(had) for bank, had in zip(banks, before, strict=True)]


def _call(
    pipeline: Any, argument: str, group: list[Any], steps: int, options: dict[str, Any], seed: int
) -> None:
    """Sample a batch. Pipelines that pass no generator to their scheduler draw from torch's."""
    device = pipeline._execution_device
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else [], enabled=True), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        pipeline(**{argument: group}, num_inference_steps=steps, generator=generator, **options)


@contextmanager
def _following(job: Job, clock: StageClock) -> Iterator[None]:
    """Let the pipeline sample with a copy of the request's scheduler that the clock follows."""
    pipeline: Any = job.pipeline
    original = pipeline.scheduler
    scheduler = copy.deepcopy(job.scheduler)
    try:
        pipeline.scheduler = scheduler
        clock.attach(scheduler)
        yield
    finally:
        clock.detach()
        pipeline.scheduler = original


@contextmanager
def _standing_in(job: Job, network: Denoiser) -> Iterator[None]:
    """Put another network into the pipeline, under the pipeline's own offloading.

    Raises:
        ValueError: an offloading by groups or layers, whose hooks are bound to the modules they
            were made for.
    """
    pipeline: Any = job.pipeline
    component = job.component or ""
    original = getattr(pipeline, component)
    if network is original:
        yield
        return
    kind = _layered_offloading(original)
    if kind is not None:
        raise ValueError(
            f"collect: pipeline must not be offloaded by {kind} while parts of it are pruned: "
            "the hooks belong to the dense modules. Use enable_model_cpu_offload(), or one "
            "package."
        )
    offloaded = bool(getattr(pipeline, "_all_hooks", None))
    device = getattr(pipeline, "_offload_device", None)

    def change(module: Any) -> None:
        if offloaded:
            pipeline.remove_all_hooks()
        setattr(pipeline, component, module)
        if offloaded:
            pipeline.enable_model_cpu_offload(device=device)

    try:
        change(network)
        yield
    finally:
        change(original)


def _layered_offloading(denoiser: nn.Module) -> str | None:
    """Name the offloading that works on parts of a denoiser, where there is one."""
    for name, module in denoiser.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if any("group_offloading" in key for key in hooks):
            return "groups (enable_group_offload)"
        if name and hasattr(module, "_hf_hook"):
            return "layers (enable_sequential_cpu_offload)"
    return None
