"""Switch fused execution on and off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..adapters import adapter_for_class
from ..groups import Denoiser, leading_parameter
from ..model_checks import EXECUTION, check_state, check_unhooked
from ..pack import twin
from ..runtime import StagedDenoiser
from ..sources import find_denoisers
from .dit import fuse_dit
from .flux import fuse_flux
from .fusion import Fusion
from .network import Network
from .pixart import fuse_pixart
from .products import Joins
from .qwen import fuse_qwen
from .sd3 import fuse_sd3
from .unet import fuse_unet
from .wan import fuse_wan

#: How to fuse a denoiser, by its class in diffusers.
FUSIONS: dict[str, Callable[[Any, Joins], Fusion]] = {
    "DiTTransformer2DModel": fuse_dit,
    "SD3Transformer2DModel": fuse_sd3,
    "FluxTransformer2DModel": fuse_flux,
    "UNet2DConditionModel": fuse_unet,
    "PixArtTransformer2DModel": fuse_pixart,
    "WanTransformer3DModel": fuse_wan,
    "QwenImageTransformer2DModel": fuse_qwen,
}


class Execution:
    """A denoiser in fused execution; see `optimize`.

    Args:
        denoiser: dense or staged.
        networks: of its stages, or its one.
        joins: all joined linears.
    """

    def __init__(self, denoiser: nn.Module, networks: list[Network], joins: Joins) -> None:
        self._denoiser, self.networks, self._joins = denoiser, networks, joins
        self._replaced: list[nn.Module] = []

    def install(self) -> None:
        """Put the forwards in place; modules that stages share get theirs once."""
        for network in self.networks:
            for module, forward in network.forwards:
                if "forward" not in module.__dict__:
                    module.__dict__["forward"] = forward
                    self._replaced.append(module)
        self._denoiser.__dict__[EXECUTION] = self

    def remove(self) -> None:
        """Take everything away again."""
        for module in self._replaced:
            module.__dict__.pop("forward", None)
        for product in self._joins.made:
            product.separate()
        self._denoiser.__dict__.pop(EXECUTION, None)


def optimize(
    model: DiffusionPipeline | Denoiser,
    *,
    fuse: bool = True,
    compile: bool | dict[str, Any] = False,
    cuda_graphs: bool = False,
) -> None:
    """Run the denoisers of a pipeline, or one denoiser, with fewer launches.

    The results are equal to rounding. Fused are timestep and label embedders that are equal, the
    projections of timestep and condition to all blocks, and queries, keys and values. The state
    dict keeps its names and values, and no weight is held twice. `restore` undoes it.

    Args:
        model: on the device where it will run; dense, or pruned by mosaicdiff.
        fuse: False leaves the network as it is, to compile it or capture graphs alone.
        compile: True, or options of `torch.compile`: each stage gets a graph of its own, and is
            compiled in its first call, which takes from seconds to minutes.
        cuda_graphs: capture a CUDA graph for each stage and shape of inputs.

    Raises:
        ValueError: a denoiser is of a family that is not fused, or is hooked, cast, quantised or
            optimized already.
        RuntimeError: `cuda_graphs` without a CUDA device.
    """
    denoisers = _denoisers(model)
    options = _compile_options(compile)
    if not (fuse or cuda_graphs or options is not None):
        raise ValueError(
            "optimize: one of fuse, compile and cuda_graphs must be True. Call mosaicdiff.restore "
            "to switch them off."
        )
    for denoiser in denoisers:
        _check(denoiser, fuse, cuda_graphs)
    done: list[Execution] = []
    try:
        for denoiser in denoisers:
            done.append(_execution(denoiser, fuse, options, cuda_graphs))
    except Exception:
        for execution in done:
            execution.remove()
        raise


def restore(model: DiffusionPipeline | Denoiser) -> None:
    """Switch off what `optimize` switched on; what was never optimized is left as it is.

    Raises:
        ValueError: hooks were put on top since.
    """
    for denoiser in _denoisers(model):
        execution = denoiser.__dict__.get(EXECUTION)
        if execution is not None:
            check_unhooked("restore", denoiser)
            execution.remove()


def optimized_twins(
    models: Sequence[nn.Module],
    joins: Joins,
    *,
    fuse: bool = True,
    compile: bool | dict[str, Any] = False,
    cuda_graphs: bool = False,
) -> list[nn.Module]:
    """Return networks around the same weights that run as `optimize` says, to be timed together.

    The networks themselves stay as they are, but for where their weights lie: joined, as long as
    `joins` lives.

    Args:
        models: dense denoisers or stages.
        joins: of all networks around these weights.
    """
    options = _compile_options(compile)
    made: dict[int, nn.Module] = {}
    twins = [twin(model, made) for model in models]
    for model in twins:
        network = _network(model, joins, fuse, options, cuda_graphs)
        for module, forward in network.forwards:
            module.__dict__.setdefault("forward", forward)
    return twins


def describe(model: DiffusionPipeline | Denoiser) -> list[dict[str, Any]]:
    """Say what is fused of each network: of every stage of every denoiser that is optimized.

    Returns:
        For each its `denoiser` class, `stage` number, `products` and the `linears` that are in
        them, `modules` that are run otherwise than diffusers runs them, and what is `left` as it
        is though others of its kind are fused.
    """
    found = []
    for denoiser in _denoisers(model):
        execution = execution_of(denoiser)
        for stage, network in enumerate(execution.networks if execution else ()):
            fusion = network.fusion
            sizes = [len(product.places) for product in fusion.products if product.places]
            found.append(
                {"denoiser": _kind(denoiser), "stage": stage, "products": len(sizes),
                 "linears": sum(sizes), "modules": len(fusion.forwards), "left": fusion.left}
            )  # fmt: skip
    return found


def execution_of(denoiser: nn.Module) -> Execution | None:
    """Return the fused execution that a denoiser is in."""
    return denoiser.__dict__.get(EXECUTION)


def _denoisers(model: Any) -> list[nn.Module]:
    if isinstance(model, DiffusionPipeline):
        return [component.denoiser for component in find_denoisers(model)]
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"optimize: model must be a pipeline or its denoiser, got {type(model).__name__}."
        )
    return [model]


def _models(denoiser: Any) -> list[nn.Module]:
    return list(denoiser.stage_models) if isinstance(denoiser, StagedDenoiser) else [denoiser]


def _kind(denoiser: nn.Module) -> str:
    if isinstance(denoiser, StagedDenoiser):
        return denoiser.info.base_class
    return type(denoiser).__name__


def _check(denoiser: nn.Module, fuse: bool, cuda_graphs: bool) -> None:
    if denoiser.__dict__.get(EXECUTION) is not None:
        raise ValueError(
            "optimize: model must not be optimized already. Call mosaicdiff.restore first."
        )
    if fuse and _kind(denoiser) not in FUSIONS:
        raise ValueError(
            f"optimize: denoiser must be one of {', '.join(FUSIONS)} to be fused, got "
            f"{_kind(denoiser)}. Pass fuse=False to compile it or capture graphs alone."
        )
    check_unhooked("optimize", denoiser)
    if cuda_graphs and isinstance(denoiser, StagedDenoiser):
        denoiser.check_graphs("optimize")
    if fuse:
        processors = adapter_for_class(_kind(denoiser)).processors
        for model in _models(denoiser):
            check_state(model, processors, caller="optimize")
    device = leading_parameter(denoiser).device
    if cuda_graphs and device.type != "cuda":
        raise RuntimeError(
            f"optimize: cuda_graphs needs the model on a CUDA device, got {device.type}. Move it "
            "there first, or leave cuda_graphs out."
        )


def _compile_options(compile: bool | dict[str, Any]) -> dict[str, Any] | None:
    """Return the options of `torch.compile`, or None to leave it."""
    return {} if compile is True else compile or None


def _network(
    model: nn.Module, joins: Joins, fuse: bool, options: dict[str, Any] | None, cuda_graphs: bool
) -> Network:
    with torch.no_grad():
        fusion = FUSIONS[type(model).__name__](model, joins) if fuse else Fusion()
    return Network(model, fusion, options, cuda_graphs)


def _is_there(denoiser: nn.Module, stage: int) -> bool:
    swap = denoiser.swap if isinstance(denoiser, StagedDenoiser) else None
    return swap is None or swap.active == stage


def _execution(
    denoiser: Any, fuse: bool, options: dict[str, Any] | None, cuda_graphs: bool
) -> Execution:
    models = _models(denoiser)
    joins = Joins(models)
    networks = [_network(m, joins, fuse, options, cuda_graphs) for m in models]
    with torch.no_grad():
        execution = Execution(denoiser, networks, joins)
        try:
            for number, network in enumerate(networks):
                # Of swapped stages only one is there; the others are joined when they come.
                if _is_there(denoiser, number):
                    network.refresh()
        except Exception:
            execution.remove()
            raise
    execution.install()
    return execution
