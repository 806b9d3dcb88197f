"""What a pipeline gives its denoiser for a prompt: recorded by running it up to the first step."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..adapters import Adapter
from ..batch_errors import in_batch
from .joining import joined

#: Texts encoded at once.
_TEXTS = 8


@dataclass
class Recorded:
    """Conditions of texts, as the denoiser is given them.

    Args:
        inputs: rows for each text, by forward argument; those of the null condition as
            `negative_<argument>`, of one row where they are the same for all texts.
        latent_shape: of one sample, as the pipeline's scheduler steps it.
        size: `height`, `width` and `num_frames` as the pipeline prepared its latents.
    """

    inputs: dict[str, torch.Tensor]
    latent_shape: tuple[int, ...]
    size: dict[str, int]


class _Stop(Exception):
    """Ends a run once the first step has called the denoiser as often as it does."""


class _Output(NamedTuple):
    """What a denoiser returns: pipelines take the first entry, or `sample`."""

    sample: torch.Tensor


@dataclass
class _Run:
    """What was heard of one run of the pipeline."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    size: dict[str, int] = field(default_factory=dict)


def record_conditions(
    pipe: Any,
    denoisers: Sequence[nn.Module],
    adapter: Adapter,
    texts: Sequence[str],
    options: Mapping[str, Any],
    steps: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Recorded:
    """Run a pipeline on texts up to its first step, and keep what its denoiser is called with.

    So every family's own way to encode texts, to batch or to repeat calls for guidance holds,
    and every text is encoded once. The denoiser does not run: nothing of it is moved or computed.
    However this ends, the pipeline is as it was; what it offloads is offloaded again.

    Args:
        pipe: whose call takes `prompt`.
        denoisers: its modules that are called, of the adapter's class.
        texts: distinct ones.
        options: other arguments of the call, e.g. height, width and guidance_scale. Guidance says
            whether there is a null condition.
        steps: that are asked for.
        advance: hears how many texts are done.

    Raises:
        RuntimeError: the pipeline calls its denoiser in a way that is not followed.
        Exception: what the pipeline raises in a batch, with the batch's number.
    """
    parts: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    count = -(-len(texts) // _TEXTS)
    with ExitStack() as stack:
        heard = stack.enter_context(_listening(pipe, denoisers))
        stack.enter_context(quiet(pipe))
        for number in range(count):
            group = list(texts[number * _TEXTS : (number + 1) * _TEXTS])
            heard.calls.clear()
            heard.latents.clear()
            try:
                _run(pipe, group, steps, options)
            except _Stop:
                pass
            except Exception as error:
                raise in_batch(error, "calibration", number, count) from error
            parts.append(_split(adapter, heard, len(group)))
            advance(len(group))
    inputs = joined(parts, adapter.conditions)
    return Recorded(inputs, tuple(heard.latents[0].shape[1:]), dict(heard.size))


def _run(pipe: Any, group: list[str], steps: int, options: Mapping[str, Any]) -> None:
    """Start a run; torch's own random state is not touched."""
    device = pipe._execution_device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        pipe(prompt=group, num_inference_steps=steps, **options)
    raise RuntimeError(
        f"calibration: the pipeline must step its scheduler, but {type(pipe).__name__} ended "
        "without. Give latents with their conditions in a file."
    )


@contextmanager
def _listening(pipe: Any, denoisers: Sequence[nn.Module]) -> Iterator[_Run]:
    """Hear a pipeline's calls of its denoisers, and end its run at the first step."""
    heard = _Run()
    scheduler = copy.deepcopy(pipe.scheduler)

    @functools.wraps(scheduler.step)
    def step(*args: Any, **kwargs: Any) -> Any:
        raise _Stop

    scheduler.step = step
    preparing = pipe.prepare_latents

    @functools.wraps(preparing)
    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(preparing).bind(*args, **kwargs)
        given.apply_defaults()
        sizes = ("height", "width", "num_frames")
        heard.size = {
            name: int(given.arguments[name]) for name in sizes if given.arguments.get(name)
        }
        return preparing(*args, **kwargs)

    original = pipe.scheduler
    with ExitStack() as stack:
        # On the instances, so that hooks, configurations and context managers are the real ones.
        stack.enter_context(_shadowed(pipe, "prepare_latents", prepare_latents))
        for denoiser in denoisers:
            stack.enter_context(_shadowed(denoiser, "forward", _stand_in(denoiser, heard)))
        pipe.scheduler = scheduler
        try:
            yield heard
        finally:
            pipe.scheduler = original
            pipe.maybe_free_model_hooks()


def _stand_in(denoiser: nn.Module, heard: _Run) -> Callable[..., _Output]:
    """Make a forward that notes its arguments and returns zeros."""
    forward = type(denoiser).forward

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> _Output:
        given = named_arguments(denoiser, args, kwargs)
        latents = next(value for name, value in given.items() if name != "self")
        heard.calls.append(given)
        heard.latents.append(latents)
        return _Output(torch.zeros_like(latents))

    return call


def named_arguments(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the arguments of a denoiser call, `self` with them."""
    bound = inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs)
    return dict(bound.arguments)


@contextmanager
def _shadowed(target: Any, name: str, value: Any) -> Iterator[None]:
    """Put an attribute on an instance, and take it away again, or restore the instance's own."""
    own, had = name in target.__dict__, target.__dict__.get(name)
    target.__dict__[name] = value
    try:
        yield
    finally:
        if own:
            target.__dict__[name] = had
        else:
            del target.__dict__[name]


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Leave out the pipeline's own progress bars."""
    had = pipe.__dict__.get("_progress_bar_config")
    pipe.set_progress_bar_config(**{**(had or {}), "disable": True})
    try:
        yield
    finally:
        if had is None:
            pipe.__dict__.pop("_progress_bar_config", None)
        else:
            pipe._progress_bar_config = had


def _split(
    adapter: Adapter, heard: _Run, texts: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Part the conditions of the calls of one step into those of the texts, and the null ones.

    diffusers batches the null condition first, but calls with it last.

    Raises:
        RuntimeError: there are other rows or calls.
    """
    rows = [len(latents) for latents in heard.latents]
    found = [adapter.conditions_of(given) for given in heard.calls]
    if rows == [texts]:
        return found[0], {}
    if rows == [2 * texts]:
        return (
            {name: value[texts:] for name, value in found[0].items()},
            {name: value[:texts] for name, value in found[0].items()},
        )
    if rows == [texts, texts]:
        return found[0], found[1]
    raise RuntimeError(
        f"calibration: the pipeline must call its denoiser on {texts} or {2 * texts} rows, or "
        f"twice on {texts}, got calls of {', '.join(map(str, rows))} rows in a step: guidance "
        "beyond that is not followed. Turn it off (--pipeline-option), or give latents with "
        "their conditions in a file."
    )
