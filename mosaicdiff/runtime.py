"""One denoiser to the outside, one sub-network a stage inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import nn

from .adapters import Adapter, adapter_for_class
from .composition.composed import Composed
from .groups import Macs, PrunableLayer
from .pack import LayerState, make_linear
from .surgery import Surgeon
from .trajectory.clock import StageClock
from .trajectory.stages import Division


@dataclass(frozen=True)
class MaskedState:
    """A linear of one stage without some of its weights: mask (m, n) bool, True where kept.

    The weight (m, n) is zero elsewhere; the bias stays the dense denoiser's.
    """

    mask: torch.Tensor
    weight: torch.Tensor


#: What of one stage differs from the dense denoiser: layers and masked linears, by name.
StageState = Mapping[str, LayerState | MaskedState]


@dataclass
class StageInfo:
    """What a staged denoiser remembers of how it was made, and what a checkpoint holds."""

    base_class: str
    base_config: dict[str, Any]
    division: Division
    layers: tuple[PrunableLayer, ...]
    #: For each stage, kept groups of every layer that is not whole.
    kept: list[dict[str, torch.Tensor]]
    #: Sampling steps of each stage in the plan.
    steps: list[int]
    prune_config: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    #: For each stage, masks of the linears that single weights were removed from (bool, CPU).
    masks: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.masks:
            self.masks = [{} for _ in self.kept]


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
        self.register_to_config(**info.base_config)

    @classmethod
    def assemble(
        cls, base: nn.Module, info: StageInfo, states: Iterable[StageState]
    ) -> StagedDenoiser:
        """Build the stages around a base denoiser, whose other modules they all share.

        Stages that hold the same masked weight, the same tensor, share the linear. `info.masks`
        becomes that of the states.

        Raises:
            ValueError: a linear is masked whose layer shrinks too.
        """
        adapter = adapter_for_class(info.base_class)
        stages, masks = [], []
        linears: dict[tuple[str, int], nn.Module] = {}
        surgeon = Surgeon(adapter, info.layers)
        states = list(states)  # held, so that no two tensors have one identity
        for state in states:
            smaller = {n: s for n, s in state.items() if isinstance(s, LayerState)}
            for layer in info.layers:
                if layer.name in smaller:
                    _refuse_masked(layer, state)
            builder = surgeon.build(base, smaller)
            masked = {n: s for n, s in state.items() if isinstance(s, MaskedState)}
            for name, masked_state in masked.items():
                key = (name, id(masked_state.weight))
                if key not in linears:
                    linears[key] = _masked_linear(base, name, masked_state)
                builder.replace(name, linears[key])
            stages.append(builder.root)
            masks.append({name: s.mask.cpu() for name, s in masked.items()})
        info.masks = masks
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the sub-network of the current stage; arguments and result are the original's."""
        stage = self._choose(args, kwargs)
        self._enter(stage)
        return self.stage_models[stage](*args, **kwargs)

    @torch.compiler.disable
    def _choose(self, args: tuple, kwargs: dict[str, Any]) -> int:
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
        """Compile every stage in place: one graph a stage, none for the choice between them."""
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

    def macs(self) -> list[Macs]:
        """Count the MACs of one call for one sample, for each stage."""
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
        if is_main_process:
            save(self, Path(save_directory), variant)

    @classmethod
    def from_pretrained(cls, path: str | Path | None, **kwargs: Any) -> StagedDenoiser:
        """Read what `save_pretrained` wrote, from a folder or a Hub repository.

        Args:
            path: folder, or Hub id.
            kwargs: `subfolder`, `torch_dtype`, `variant`, `device_map`, `revision`, `token`,
                `cache_dir`, `local_files_only`.

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


def _refuse_masked(layer: PrunableLayer, state: StageState) -> None:
    for name in layer.modules:
        if name in state:
            raise ValueError(
                f"StagedDenoiser: {name} must not be masked where {layer.name} shrinks, got both. "
                "Remove groups or single weights of a layer, not both."
            )


def _masked_linear(base: nn.Module, name: str, state: MaskedState) -> nn.Module:
    """Make the linear of a masked weight, with the dense one's own bias parameter."""
    dense: Any = base.get_submodule(name)
    if not state.weight.shape == state.mask.shape == dense.weight.shape:
        raise ValueError(
            f"StagedDenoiser: weight and mask of {name} must be {tuple(dense.weight.shape)}, got "
            f"{tuple(state.weight.shape)} and {tuple(state.mask.shape)}."
        )
    linear = make_linear(state.weight, dense.bias)
    linear.register_parameter("bias", dense.bias)  # itself: it stays shared when moved or trained
    return linear
