"""One denoiser to the outside, one sub-network a stage inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import nn

from .adapters import Adapter, adapter_for_class
from .composition.composed import Composed
from .composition.hindrances import check_plain_weights
from .groups import Macs
from .memory.swap import StageSwap
from .memory.ties import equal_parameters, tie, tie_storages
from .model_checks import EXECUTION
from .pack import LayerState
from .stage_state import MaskedState, StageInfo, StageState, masked_linear, refuse_masked
from .surgery import Surgeon
from .trajectory.clock import StageClock
from .trajectory.stages import Division

_GRAPHS = (
    "{} must be 'resident' where CUDA graphs are captured, got {!r}: a graph knows weights by "
    "their place, and swapped ones change it. Compile without them, or keep all stages resident."
)


class StagedDenoiser(Composed, ModelMixin, ConfigMixin):
    """Call like the denoiser it was made from; each stage runs a smaller dense sub-network.

    Attached to a scheduler (a pipeline does that by itself) it follows the sampler's steps on
    the host; otherwise it reads the timestep of each call.

    Args:
        info: how it was made; `info.division` says which timesteps are whose.
        stage_models: one module a stage, noisiest first. What was not pruned is the same
            module object in all of them.
    """

    config_name = "config.json"

    def __init__(self, info: StageInfo, stage_models: Iterable[nn.Module]) -> None:
        super().__init__()
        self.info = info
        self.stage_models = nn.ModuleList(stage_models)
        self.adapter: Adapter = adapter_for_class(info.base_class)
        # diffusers leaves these out where it asks for the type of a model.
        self._keep_in_fp32_modules = sorted(self.adapter.float32_modules) or None
        self._clock = StageClock(info.division, time_scale(self.adapter, info.base_config))
        #: Where the stages are in swap mode.
        self.swap: StageSwap | None = None
        self._captures_graphs = False
        self.register_to_config(**info.base_config)

    @classmethod
    def assemble(
        cls, base: nn.Module, info: StageInfo, states: Iterable[StageState]
    ) -> StagedDenoiser:
        """Build the stages around a base denoiser, whose other modules they all share.

        Stages that hold the same masked weight, the same tensor, share the linear; parameters
        that the base holds several times (`Adapter.repeats`) become one. `info.masks` becomes
        that of the states.

        Raises:
            ValueError: a linear is masked whose layer shrinks too.
        """
        adapter = adapter_for_class(info.base_class)
        stages, masks = [], []
        linears: dict[tuple[str, int], nn.Module] = {}
        surgeon = Surgeon(adapter, info.layers)
        twins = equal_parameters(base, adapter.repeats)
        states = list(states)  # held, so that no two tensors have one identity
        for state in states:
            smaller = {n: s for n, s in state.items() if isinstance(s, LayerState)}
            for layer in info.layers:
                if layer.name in smaller:
                    refuse_masked(layer, state)
            builder = surgeon.build(base, smaller)
            tie(builder, twins)
            masked = {n: s for n, s in state.items() if isinstance(s, MaskedState)}
            for name, masked_state in masked.items():
                key = (name, id(masked_state.weight))
                if key not in linears:
                    linears[key] = masked_linear(base, name, masked_state)
                builder.replace(name, linears[key])
            stages.append(builder.root)
            masks.append({name: s.mask.cpu() for name, s in masked.items()})
        info.masks = masks
        tie_storages(base, stages)
        return cls(info, stages).eval()

    @property
    def division(self) -> Division:
        return self.info.division

    @property
    def masks(self) -> list[dict[str, torch.Tensor]]:
        """For each stage, masks of its linears by name, (m, n) bool on the CPU, True where kept.

        What trains the weights must keep the others zero, or saving refuses: after each step,
        `stage.get_submodule(name).weight.data.mul_(mask.to(device))`.
        """
        return self.info.masks

    @property
    def stage_memory(self) -> str:
        """Where the stages are: `resident`, all on the device, or `swap`, one at a time."""
        return "resident" if self.swap is None else "swap"

    def set_stage_memory(self, mode: str) -> None:
        """Choose between speed and memory on the device; results are the same bits.

        Args:
            mode: `resident` has every stage's own layers on the device. `swap` has what all stages
                share and one stage's layers there; the others are in the host's memory, writers
                once for all stages, and are gathered from it where a stage begins.

        Raises:
            ValueError: the mode is another, or the stages capture CUDA graphs.
        """
        if mode not in ("resident", "swap"):
            raise ValueError(
                f"set_stage_memory: mode must be 'resident' or 'swap', got {mode!r}. "
                "'swap' is for devices that do not hold all stages."
            )
        if mode == self.stage_memory:
            return
        for there, what, cure in (
            (self.is_cache_enabled, "a cache is on", "disable_cache()"),
            (self._loras is not None, "a LoRA is loaded", "mosaicdiff.unload_lora"),
        ):
            if there:
                raise ValueError(
                    f"set_stage_memory: mode must be {self.stage_memory!r} while {what}, got "
                    f"{mode!r}. Call {cure} first."
                )
        check_plain_weights(self, "set_stage_memory")
        if self.swap is not None:
            self.swap.dissolve()
            self.swap = None
            return
        execution = self.__dict__.get(EXECUTION)
        networks = [] if execution is None else execution.networks
        if self._captures_graphs or any(network.captures for network in networks):
            raise ValueError(_GRAPHS.format("set_stage_memory: mode", mode))
        for network in networks:
            network.release()
        surgeon = Surgeon(self.adapter, self.info.layers)
        self.swap = StageSwap(list(self.stage_models), surgeon, self.info.kept)

    def activate_stage(self, stage: int) -> None:
        """Bring a stage onto the device in swap mode, as a call at its timesteps does.

        Needed only before one of `stage_models` is called by itself.
        """
        swap, stage = self.swap, range(len(self.stage_models))[stage]
        if swap is None or swap.active == stage:
            return
        execution = self.__dict__.get(EXECUTION)
        if execution is not None:
            swap.rejoined = True  # fused execution gives weights other memory
            if swap.active is not None:
                execution.networks[swap.active].release(execution.networks[stage])
        swap.activate(stage)

    def check_graphs(self, caller: str) -> None:
        """Refuse to capture CUDA graphs in swap mode.

        Raises:
            ValueError: as said.
        """
        if self.swap is not None:
            raise ValueError(_GRAPHS.format(f"{caller}: stage_memory", "swap"))

    def whole_stages(self) -> AbstractContextManager[None]:
        """Let every stage hold its values, for reading: in swap mode inactive ones on the host."""
        return nullcontext() if self.swap is None else self.swap.gathered()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the sub-network of the current stage; arguments and result are the original's."""
        stage = self._choose(args, kwargs)
        self._enter(stage)
        return self.stage_models[stage](*args, **kwargs)

    @torch.compiler.disable
    def _choose(self, args: tuple, kwargs: dict[str, Any]) -> int:
        stage = self._stage_of_call(args, kwargs)
        self.activate_stage(stage)
        return stage

    def _stage_of_call(self, args: tuple, kwargs: dict[str, Any]) -> int:
        if len(self.stage_models) == 1:
            return 0
        name, position = self.adapter.timestep_argument
        timestep = kwargs.get(name, args[position] if len(args) > position else None)
        if timestep is None:
            raise ValueError(f"StagedDenoiser: {name} must be given, got None. It tells the stage.")
        return self._clock.stage_of_call(timestep)

    def attach(self, scheduler: Any) -> None:
        """Follow a scheduler, so that no call has to read its timestep.

        Pipelines attach by themselves. Inside a run the scheduler's position decides: a loop
        that calls the denoiser out of the scheduler's order must `detach` first.

        Raises:
            ValueError: the scheduler gives no signal-to-noise ratio.
        """
        self._clock.attach(scheduler)

    def detach(self) -> None:
        """Let go of every scheduler, restoring their methods."""
        self._clock.detach()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile every stage in place: one graph a stage, none for the choice between them.

        Raises:
            ValueError: CUDA graphs are asked for in swap mode.
        """
        mode, options = kwargs.get("mode"), kwargs.get("options") or {}
        captures = mode == "reduce-overhead" or bool(options.get("triton.cudagraphs"))
        captures = captures or mode == "max-autotune"
        if captures:
            self.check_graphs("compile")
        self._captures_graphs = captures
        for stage in self.stage_models:
            stage.compile(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return what no stage has a part of its own of: pipelines read `add_embedding` and such.

        Only modules that all stages share, and plain values: a method of one stage would change
        that one alone.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            stages = self.__dict__.get("_modules", {}).get("stage_models")
            if stages is None or name.startswith("_"):
                raise
            first, *others = (getattr(stage, name, None) for stage in stages)
            shared = isinstance(first, nn.Module) and all(other is first for other in others)
            plain = isinstance(first, (bool, int, float, str)) and all(o == first for o in others)
            if shared or plain:
                return first
            raise

    def _apply(self, fn: Any, recurse: bool = True) -> StagedDenoiser:
        """Move or cast; in swap mode one stage moves, and the bank only changes its type."""
        with nullcontext() if self.swap is None else self.swap.resting():
            super()._apply(fn, recurse)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state; refused in swap mode, where inactive stages are empty."""
        self._refuse_swapped("state_dict")
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state; refused in swap mode, where inactive stages are empty."""
        self._refuse_swapped("load_state_dict")
        return super().load_state_dict(*args, **kwargs)

    def _refuse_swapped(self, function: str) -> None:
        if self.swap is not None:
            raise ValueError(
                f"{function}: stage_memory must be 'resident', got 'swap', in which only one "
                "stage's layers are there. Call set_stage_memory('resident') first; "
                "save_pretrained works in both."
            )

    def macs(self) -> list[Macs]:
        """Count the MACs of one call for one sample, for each stage."""
        with nullcontext() if self.swap is None else self.swap.shapes():
            return [self.adapter.macs(stage) for stage in self.stage_models]

    def mean_macs(self, counts: Sequence[Macs] | None = None) -> tuple[float, float]:
        """Average over the plan's steps: (without, with) attention products.

        Args:
            counts: what `macs` gave, where that is known.
        """
        weight = [count / sum(self.info.steps) for count in self.info.steps]
        counts = self.macs() if counts is None else counts
        return (
            sum(w * m.linear for w, m in zip(weight, counts, strict=True)),
            sum(w * m.total for w, m in zip(weight, counts, strict=True)),
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Write `config.json`, safetensors and the report; see docs/checkpoint-format.md.

        Args:
            save_directory: created if missing; of a folder that exists only these files change.
            safe_serialization: False is refused, there is no pickle format.
            variant: as in diffusers, part of the file's name.
            is_main_process: other processes write nothing.
        """
        from .checkpoint import save

        if not safe_serialization:
            raise ValueError(
                "save_pretrained: safe_serialization must be True, got False. "
                "A staged denoiser is saved as safetensors only."
            )
        check_plain_weights(self, "save_pretrained")
        if is_main_process:
            save(self, Path(save_directory), variant)

    @classmethod
    def from_pretrained(cls, path: str | Path | None, **kwargs: Any) -> StagedDenoiser:
        """Read what `save_pretrained` wrote, from a folder or a Hub repository.

        Args:
            path: folder, or Hub id.
            kwargs: `stage_memory` (as of `set_stage_memory`), `subfolder`, `torch_dtype`,
                `variant`, `device_map`, `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            ValueError: the folder holds no staged denoiser, or one of another version.
        """
        from .checkpoint_load import load

        if path is None:
            raise ValueError("StagedDenoiser: path must be a folder or a Hub id, got None.")
        return load(path, **kwargs)


def time_scale(adapter: Adapter, config: Mapping[str, Any]) -> float:
    """Return what a denoiser is given as a timestep over what its scheduler calls it.

    Flow-matching schedulers call it 1000 sigma, of which some pipelines give a thousandth
    (FLUX, Qwen-Image) and Sana's `timestep_scale` times as much.
    """
    stated = config.get("timestep_scale")
    if stated is not None:
        return float(stated)
    return 1.0 if adapter.sigma_scale is None else adapter.sigma_scale / 1000
