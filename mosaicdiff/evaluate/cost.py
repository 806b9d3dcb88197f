"""What a picture costs: parameters, bytes, and the MACs of the calls that a pipeline makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only

from ..adapters.macs import count_macs
from ..checkpoint import storage_of
from ..groups import Denoiser
from ..masked_storage import stored_size
from ..runtime import StagedDenoiser
from ..sources import find_denoisers


@dataclass
class Calls:
    """The calls of one denoiser while it was watched.

    Args:
        denoiser: which.
        samples: rows of all calls together.
        first: arguments of the first call.
    """

    denoiser: Denoiser
    samples: int = 0
    first: tuple[tuple, dict[str, Any]] | None = field(default=None, repr=False)

    def hear(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Take notice of a call; a hook."""
        if self.first is None:
            empty = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
            self.first = empty
        self.samples += _rows(args, kwargs)

    def macs(self) -> tuple[float, float]:
        """Count the MACs of all samples: (without, with) attention products.

        Those of one sample are counted at the shapes of the first call; of stages they are the
        mean over the plan's steps.
        """
        if self.first is None:
            return 0.0, 0.0
        args, kwargs = self.first

        def call(copy: Denoiser, device: torch.device) -> None:
            copy(*args, **kwargs)

        leaves, _ = tree_flatten((args, kwargs))
        sizes = tuple(tuple(x.shape) if torch.is_tensor(x) else repr(x) for x in leaves)
        staged = isinstance(self.denoiser, StagedDenoiser)
        networks = list(self.denoiser.stage_models) if staged else [self.denoiser]
        counts = [count_macs(network, call, ("call", *sizes)) for network in networks]
        if staged:
            linear, total = self.denoiser.mean_macs(counts)
        else:
            linear, total = float(counts[0].linear), float(counts[0].total)
        share = self.samples / _rows(args, kwargs)
        return linear * share, total * share


def _rows(args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Return the samples of a call: the rows of the latents, which come first."""
    found = next(x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.ndim > 1)
    return len(found)


@contextmanager
def watched(calls: Sequence[Calls]) -> Iterator[None]:
    """Count the calls of denoisers while a block runs, adding to what was counted before."""
    handles = [
        each.denoiser.register_forward_pre_hook(each.hear, with_kwargs=True) for each in calls
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def calls_of(pipe: DiffusionPipeline) -> list[Calls]:
    """Return a count of calls, still at nothing, for each denoiser of a pipeline."""
    return [Calls(component.denoiser) for component in find_denoisers(pipe)]


def pipeline_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """Return the parameters and bytes that a checkpoint of a pipeline's denoisers holds."""
    sizes = [denoiser_size(component.denoiser) for component in find_denoisers(pipe)]
    return sum(parameters for parameters, _ in sizes), sum(size for _, size in sizes)


def denoiser_size(denoiser: nn.Module) -> tuple[int, int]:
    """Return the parameters and bytes that a checkpoint of a denoiser holds."""
    if isinstance(denoiser, StagedDenoiser):
        return stored_size(storage_of(denoiser)[0].items())
    tensors = [parameter.detach() for parameter in denoiser.parameters()]
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)
