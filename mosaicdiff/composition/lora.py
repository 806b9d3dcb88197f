"""A LoRA of the dense model on a pruned one, and one of the pruned model on the dense one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..groups import Denoiser
from ..model_checks import check_not_optimized
from ..pack import StandIn
from ..runtime import StagedDenoiser
from .hindrances import check_plain_weights, check_resident
from .lora_file import LoraSource, pairs_of, read_lora
from .lora_slice import KeptParts, LoraPair, kept_parts


class LoadedLoras:
    """The LoRAs that were added to the weights of a denoiser, and the weights from before.

    Args:
        staged: whose weights are changed in place: what shares them goes on sharing them.
    """

    def __init__(self, staged: StagedDenoiser) -> None:
        self._staged = staged
        self.adapters: dict[str, list[LoraPair]] = {}
        self._before: dict[tuple[int, str], torch.Tensor] = {}

    def __deepcopy__(self, memo: dict) -> LoadedLoras:
        copied = LoadedLoras(memo.get(id(self._staged), self._staged))
        copied.adapters, copied._before = dict(self.adapters), dict(self._before)
        return copied

    @torch.no_grad()
    def set(self, adapters: dict[str, list[LoraPair]]) -> None:
        """Make the weights those from before plus these LoRAs, each sum rounded once."""
        self._restore()
        self.adapters = adapters
        try:
            for stage, module, weight, change in self._changes():
                self._before[stage, module] = weight.cpu().clone()
                weight.copy_(change.add_(weight.to(change)))
        except Exception:
            self._restore()
            self.adapters = {}
            raise

    def _restore(self) -> None:
        for (stage, module), weight in self._before.items():
            self._weight(stage, module).copy_(weight)
        self._before = {}

    def _changes(self):
        """Give each weight that is changed once, with the sum of its changes."""
        staged = self._staged
        shapes = dense_shapes(staged)
        by_module: dict[str, list[LoraPair]] = {}
        for pair in (pair for pairs in self.adapters.values() for pair in pairs):
            by_module.setdefault(pair.module, []).append(pair)
        seen: dict[tuple, KeptParts] = {}
        for module, pairs in by_module.items():
            for stage in range(len(staged.stage_models)):
                parts = stage_parts(staged, stage, module, shapes[module])
                gone = 0 in parts.shape(shapes[module])[:2]
                if gone or _stood_for(staged.stage_models[stage], module):
                    continue  # nothing of it is left in this stage
                weight = self._weight(stage, module)
                key = (weight.data_ptr(), weight.shape, weight.stride())
                if key in seen:
                    continue
                seen[key] = parts
                wide = torch.promote_types(weight.dtype, torch.float32)
                change = torch.zeros(weight.shape, dtype=wide)
                for pair in pairs:
                    change += parts.slice(pair).change(wide)
                mask = staged.masks[stage].get(module)
                change = change if mask is None else change * mask
                yield stage, module, weight, change.to(weight.device)

    def _weight(self, stage: int, module: str) -> torch.Tensor:
        owner: Any = self._staged.stage_models[stage].get_submodule(module)
        weight: torch.Tensor = owner.weight.detach()
        return weight


def _stood_for(stage: nn.Module, name: str) -> bool:
    """Tell whether a module lay in a layer of which only biases are left."""
    parents = name.split(".")
    places = (".".join(parents[:depth]) for depth in range(1, len(parents)))
    return any(isinstance(_found(stage, place), StandIn) for place in places)


def _found(stage: nn.Module, name: str) -> nn.Module | None:
    try:
        return stage.get_submodule(name)
    except AttributeError:
        return None


def load_lora(
    pipe: Any,
    source: LoraSource,
    *,
    scale: float = 1.0,
    adapter_name: str = "default",
    weight_name: str | None = None,
    component: str | None = None,
) -> None:
    """Add a LoRA for the dense model to a pruned one, in each stage what it keeps.

    W + scale * alpha / rank * up @ down, rows and columns of removed groups left out: on weights
    without compensation, exactly the dense model with the LoRA, cut afterwards. What pruning has
    refitted was refitted without the LoRA. The weights are changed in place, so that sampling
    costs nothing and saving writes the LoRA in; those from before are kept on the CPU until
    `unload_lora`.

    Args:
        pipe: with a pruned denoiser, or that itself.
        source: a .safetensors file, a folder with one, or tensors by name; in the layout of
            diffusers, peft, or whatever the pipeline's own loader converts.
        scale: of all of it.
        adapter_name: by which `unload_lora` knows it.
        weight_name: of the file in a folder.
        component: the denoiser's, where the pipeline has two that are pruned.

    Raises:
        ValueError: names what cannot be loaded: another model's LoRA, a text encoder's part, DoRA
            and the like; weights that are quantised, cast or offloaded. Nothing is changed then.
    """
    if not math.isfinite(scale):
        raise ValueError(f"load_lora: scale must be finite, got {scale}.")
    name, staged = _pruned(pipe, component, "load_lora")
    check_plain_weights(staged, "load_lora")
    loaded = staged._loras or LoadedLoras(staged)
    if adapter_name in loaded.adapters:
        raise ValueError(
            f"load_lora: adapter_name must be new, got {adapter_name!r} again. Call "
            "mosaicdiff.unload_lora first, or give it another name."
        )
    pairs = read_lora(pipe, name, source, weight_name)
    _check_shapes(staged, pairs)
    scaled = [LoraPair(p.module, p.down.cpu(), p.up.cpu(), p.scale * scale) for p in pairs]
    loaded.set(loaded.adapters | {adapter_name: scaled})
    staged._loras = loaded


def unload_lora(
    pipe: Any, adapter_name: str | None = None, *, component: str | None = None
) -> None:
    """Take a LoRA away again, or all of them: the weights are those from before, to the bit.

    Args:
        pipe, component: as in `load_lora`.
        adapter_name: of one; None means all.

    Raises:
        ValueError: none of that name is loaded.
    """
    _, staged = _pruned(pipe, component, "unload_lora")
    loaded = staged._loras
    known = [] if loaded is None else list(loaded.adapters)
    if loaded is None or (adapter_name is not None and adapter_name not in known):
        asked = "" if adapter_name is None else f" {adapter_name!r}"
        raise ValueError(
            f"unload_lora: a LoRA{asked} must be loaded, got {', '.join(known) or 'none'}."
        )
    check_plain_weights(staged, "unload_lora")
    left = {n: p for n, p in loaded.adapters.items() if adapter_name not in (None, n)}
    loaded.set(left)
    if not left:
        staged._loras = None


def expand_lora(
    denoiser: Any, tensors: Mapping[str, torch.Tensor], *, stage: int | None = None
) -> dict[str, torch.Tensor]:
    """Widen a LoRA that was trained on a pruned model to the dense one's layers.

    Rows and columns of removed groups are zero: on the dense model it changes what the pruned one
    kept, as it was trained, and nothing else.

    Args:
        denoiser: the pruned one, or its pipeline.
        tensors: by peft's names; those of several stages begin with `stage_models.<number>.`.
        stage: whose widths they have; None where there is one, or where the names say it.

    Returns:
        The matrices by peft's names, with the prefix they came with, and their alphas.

    Raises:
        ValueError: the stage is not known, or a matrix does not fit it.
    """
    _, staged = _pruned(denoiser, None, "expand_lora")
    prefix, own = _of_stage(tensors, len(staged.stage_models), stage)
    number, named = own
    shapes = dense_shapes(staged)
    found: dict[str, torch.Tensor] = {}
    for pair in pairs_of(named):
        if pair.module not in shapes:
            raise _foreign("expand_lora", pair.module)
        dense = shapes[pair.module]
        parts = stage_parts(staged, number, pair.module, dense)
        _check_pair("expand_lora", pair, parts.shape(dense), f"stage {number}'s")
        wide = parts.expand(pair, dense)
        found[f"{prefix}{pair.module}.lora_A.weight"] = wide.down
        found[f"{prefix}{pair.module}.lora_B.weight"] = wide.up
        if f"{pair.module}.alpha" in named:
            found[f"{prefix}{pair.module}.alpha"] = named[f"{pair.module}.alpha"]
    return found


def _of_stage(
    tensors: Mapping[str, torch.Tensor], count: int, stage: int | None
) -> tuple[str, tuple[int, dict[str, torch.Tensor]]]:
    """Return the prefix of all names, the stage, and the tensors without either."""
    pattern = re.compile(
        r"(?P<prefix>(base_model\.model\.)?(transformer\.|transformer_2\.|unet\.)?)"
        r"(stage_models\.(?P<stage>\d+)\.)?(?P<rest>.+)"
    )
    matches = [(pattern.fullmatch(name), value) for name, value in tensors.items()]
    prefixes = {match["prefix"] for match, _ in matches if match}
    stages = {int(match["stage"]) for match, _ in matches if match and match["stage"]}
    if stage is None:
        stage = next(iter(stages)) if len(stages) == 1 else 0 if count == 1 else None
    if stage is None or not 0 <= stage < count or len(prefixes) != 1:
        raise ValueError(
            f"expand_lora: stage must be one of 0..{count - 1}, got "
            f"{stage if stage is not None else sorted(stages) or None}. Each stage has widths of "
            "its own: expand its part alone."
        )
    named = {
        match["rest"]: value
        for match, value in matches
        if match and match["stage"] in (None, str(stage))
    }
    return next(iter(prefixes)), (stage, named)


def dense_shapes(staged: StagedDenoiser) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the dense linears' and convolutions' weights, by module."""
    dense: Denoiser = staged.adapter.empty(staged.info.base_config)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {n: tuple(m.weight.shape) for n, m in dense.named_modules() if isinstance(m, kinds)}


def stage_parts(
    staged: StagedDenoiser, stage: int, module: str, shape: tuple[int, ...]
) -> KeptParts:
    """Find what one stage keeps of a dense weight."""
    return kept_parts(staged.info.layers, staged.info.kept[stage], module, shape)


def _pruned(pipe: Any, component: str | None, caller: str) -> tuple[str, StagedDenoiser]:
    """Return the pruned denoiser, and the component that holds it.

    Raises:
        ValueError: there is none, or it is in fused execution or swapped.
    """
    if isinstance(pipe, StagedDenoiser):
        held = {"unet" if "UNet" in pipe.info.base_class else "transformer": pipe}
    else:
        components = getattr(pipe, "components", {})
        held = {n: c for n, c in components.items() if isinstance(c, StagedDenoiser)}
    name = component or next(iter(held), None)
    if name not in held:
        names = ", ".join(held) or "none"
        raise ValueError(
            f"{caller}: pipeline must hold a pruned {component or 'denoiser'}, got {names}. Prune "
            "it first; a dense one takes a LoRA by its pipeline's own load_lora_weights, if it has "
            "one."
        )
    check_not_optimized(held[name], caller)
    check_resident(held[name], caller)
    return name, held[name]


def _check_shapes(staged: StagedDenoiser, pairs: list[LoraPair]) -> None:
    shapes = dense_shapes(staged)
    for pair in pairs:
        if pair.module not in shapes:
            raise _foreign("load_lora", pair.module)
        _check_pair("load_lora", pair, shapes[pair.module], "the dense model's")


def _foreign(caller: str, module: str) -> ValueError:
    return ValueError(
        f"{caller}: LoRA must be of this model's linears and convolutions, got {module}. Was it "
        "made for another model?"
    )


def _check_pair(caller: str, pair: LoraPair, shape: tuple[int, ...], whose: str) -> None:
    down, up = pair.down, pair.up
    product = (up.shape[0], *down.shape[1:])
    if product != shape or down.shape[0] != up.shape[1] or up[0, 0].numel() != 1:
        raise ValueError(
            f"{caller}: LoRA of {pair.module} must be as wide as {whose} {shape}, got "
            f"{tuple(up.shape)} and {tuple(down.shape)}. Was it made for another model, or for a "
            "pruned one?"
        )
