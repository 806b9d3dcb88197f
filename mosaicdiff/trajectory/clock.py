"""Follow a scheduler from the host, so that the denoiser knows its stage without reading tensors.

`attach` shadows `set_timesteps`, `step` and `set_begin_index` on the scheduler *instance*. The
stage of every entry of `scheduler.timesteps` is worked out once per `set_timesteps`; after that
a step only moves an integer. Forward calls are never counted: guidance makes one call or two.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from .schedule import NoiseSchedule, step_log_snr
from .schedulers import is_flow_class
from .stages import Division

_LISTENERS = "_mosaicdiff_clocks"
_SHADOWED = ("set_timesteps", "step", "set_begin_index")


@dataclass
class _Run:
    """One pass of a sampler: the stage of each entry of `scheduler.timesteps`."""

    scheduler: weakref.ref
    table: list[int]
    #: Entry the next denoiser call belongs to; None until the first call tells.
    position: int | None


@dataclass(frozen=True)
class Place:
    """Where in a run of a sampler a denoiser call is.

    Args:
        stage: of the division.
        position: among the entries of `scheduler.timesteps`.
        entries: how many there are; a sampler with two calls a step has more than steps.
    """

    stage: int
    position: int
    entries: int


class StageClock:
    """Tell the stage of the next denoiser call.

    Where no attached scheduler is in the middle of a run, the stage is read from the timestep
    itself: correct, at one synchronisation a call.

    Args:
        division: the stages.
        time_scale: what the denoiser is given as a timestep, over what the scheduler calls it:
            0.001 where the pipeline divides by 1000 (FLUX, Qwen-Image).
    """

    def __init__(self, division: Division, time_scale: float = 1.0) -> None:
        self.division, self._time_scale = division, time_scale
        self._attached: list[weakref.ref] = []
        self._run: _Run | None = None

    def __deepcopy__(self, memo: dict) -> StageClock:
        # A copied denoiser must not follow the original's scheduler.
        return StageClock(self.division, self._time_scale)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_attached": [], "_run": None}

    @property
    def run(self) -> object | None:
        """A token of the run that is under way, another one for each; None where there is none."""
        return self._run

    @property
    def schedulers(self) -> list[Any]:
        """The schedulers followed, those still alive."""
        return [s for s in (ref() for ref in self._attached) if s is not None]

    def attach(self, scheduler: Any) -> None:
        """Follow a scheduler from now on; a run it has already begun is joined.

        Raises:
            ValueError: the scheduler gives no signal-to-noise ratio.
        """
        if any(scheduler is known for known in self.schedulers):
            return
        NoiseSchedule.from_scheduler(scheduler)
        _shadow(scheduler)
        scheduler.__dict__[_LISTENERS].append(weakref.ref(self))
        self._attached = [ref for ref in self._attached if ref() is not None]
        self._attached.append(weakref.ref(scheduler))
        if getattr(scheduler, "num_inference_steps", None) is not None:
            self._begin(scheduler, position=None)

    def detach(self) -> None:
        """Let go of every scheduler; one that nobody else follows is as it was before."""
        for scheduler in self.schedulers:
            listeners = scheduler.__dict__.get(_LISTENERS, [])
            listeners[:] = [ref for ref in listeners if ref() is not None and ref() is not self]
            if not listeners:
                for name in (*_SHADOWED, _LISTENERS):
                    scheduler.__dict__.pop(name, None)
        self._attached, self._run = [], None

    def stage_of_call(self, timestep: torch.Tensor | float) -> int:
        """Return the stage of a denoiser call that was given this timestep."""
        place = self.place_of_call(timestep)
        return self._read(timestep) if place is None else place.stage

    def place_of_call(self, timestep: torch.Tensor | float | None) -> Place | None:
        """Return where in the run of an attached scheduler a call is that was given this timestep.

        None where no run is under way, or the timestep is none of it.
        """
        run = self._run
        if run is not None and run.position is None and timestep is not None:
            run.position = _locate(run.scheduler(), timestep, self._time_scale)
        if run is None or run.position is None or run.position >= len(run.table):
            return None
        return Place(run.table[run.position], run.position, len(run.table))

    def notify(
        self, scheduler: Any, event: str, begin: int | None = None, result: Any = None
    ) -> None:
        """Hear of a call on a scheduler; those not followed (copies) are ignored."""
        if not any(scheduler is known for known in self.schedulers):
            return
        if event == "set_timesteps":
            # Pipelines that start late say so by set_begin_index, where the scheduler has it.
            known = hasattr(scheduler, "set_begin_index")
            self._begin(scheduler, position=0 if known else None)
        elif self._run is not None and self._run.scheduler() is scheduler:
            if event == "set_begin_index":
                self._run.position = begin
            elif self._run.position is not None:
                self._run.position += 1

    def _begin(self, scheduler: Any, position: int | None) -> None:
        table = self.division.stage_of_log_snr(step_log_snr(scheduler)).tolist()
        self._run = _Run(weakref.ref(scheduler), table, position)

    def _read(self, timestep: torch.Tensor | float) -> int:
        if not torch.is_tensor(timestep):
            return self._stage_of(timestep)
        low, high = torch.stack(torch.aminmax(timestep.float())).tolist()
        stage = self._stage_of(high)
        # Wan 2.2 gives every token a time: 0 to those of the picture that the video goes on from.
        if timestep.ndim < 2 and stage != self._stage_of(low):
            raise ValueError(
                "StagedDenoiser: timestep must lie in one stage for the whole batch, got "
                f"{low:g}..{high:g}. Call the denoiser once for each stage."
            )
        return stage

    def _stage_of(self, timestep: float) -> int:
        return self.division.stage_of_timestep(timestep / self._time_scale)


def _locate(scheduler: Any, timestep: torch.Tensor | float, scale: float = 1.0) -> int | None:
    """Find the entry of `scheduler.timesteps` that a first call was given.

    A view into that very tensor tells by its address, without a read; anything else is read,
    once a run.

    Args:
        scale: of the call's timestep over the scheduler's.
    """
    if scheduler is None:
        return None
    known = scheduler.timesteps
    if torch.is_tensor(timestep) and timestep.numel() > 0:
        storage = timestep.untyped_storage().data_ptr()
        if timestep.dtype == known.dtype and storage == known.untyped_storage().data_ptr():
            return (timestep.storage_offset() - known.storage_offset()) // max(1, known.stride(0))
        value = float(timestep.max())
        rounding = _rounding(timestep.dtype)
    else:
        value, rounding = float(timestep), 0.0
    entries = known.tolist()
    if not entries:
        return None
    # Pipelines hand the time over in the latents' type: bfloat16 keeps 8 bits of it.
    gaps = [abs(entry * scale - value) for entry in entries]
    nearest = min(range(len(entries)), key=gaps.__getitem__)
    return nearest if gaps[nearest] <= 1e-3 * scale + rounding * abs(value) else None


def _rounding(dtype: torch.dtype) -> float:
    """Return the largest relative error of a number that went through a type."""
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _shadow(scheduler: Any) -> None:
    """Put listening methods in front of a scheduler's own, on the instance only.

    They are bound methods that look the class's method up, so that a deep copy of the scheduler
    gets methods of its own.
    """
    if _LISTENERS in scheduler.__dict__:
        return
    scheduler.__dict__[_LISTENERS] = []
    for name in _SHADOWED:
        if hasattr(type(scheduler), name):
            wrapper = _WRAPPERS[name](getattr(type(scheduler), name))
            scheduler.__dict__[name] = types.MethodType(wrapper, scheduler)


def _tell(scheduler: Any, event: str, begin: int | None = None, result: Any = None) -> None:
    for ref in list(scheduler.__dict__.get(_LISTENERS, ())):
        clock = ref()
        if clock is not None:
            clock.notify(scheduler, event, begin, result)


def _read_on_device(scheduler: Any) -> tuple[str, ...]:
    """Name what `set_timesteps` puts onto the device, where that has to be read for the levels."""
    if not hasattr(scheduler, "sigmas"):
        return ("timesteps",)
    if hasattr(scheduler, "sigmas_interpol"):  # KDPM2: its sigmas themselves stay
        between = ("sigmas_interpol", "sigmas_up", "sigmas_down")
        return ("timesteps", *(name for name in between if hasattr(scheduler, name)))
    return ("timesteps", "sigmas") if is_flow_class(scheduler) else ()


def _wrap_set_timesteps(method: Any) -> Any:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Most schedulers with sigmas keep those on the CPU. Those without (DDIM, DDPM) have only
        # their timesteps, and some move both: made on the CPU and moved afterwards, since
        # reading back waits for the device.
        bound = signature.bind(self, *args, **kwargs)
        moved = _read_on_device(self)
        device = bound.arguments.get("device") if moved else None
        if device is not None:
            bound.arguments["device"] = torch.device("cpu")
        result = method(*bound.args, **bound.kwargs)
        _tell(self, "set_timesteps")
        if device is not None:
            for name in moved:
                setattr(self, name, getattr(self, name).to(device))
        return result

    return set_timesteps


def _wrap_step(method: Any) -> Any:
    @functools.wraps(method)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        _tell(self, "step", result=result)
        return result

    return step


def _wrap_set_begin_index(method: Any) -> Any:
    @functools.wraps(method)
    def set_begin_index(self: Any, begin_index: int = 0) -> Any:
        result = method(self, begin_index)
        _tell(self, "set_begin_index", begin_index)
        return result

    return set_begin_index


_WRAPPERS = {
    "set_timesteps": _wrap_set_timesteps,
    "step": _wrap_step,
    "set_begin_index": _wrap_set_begin_index,
}
