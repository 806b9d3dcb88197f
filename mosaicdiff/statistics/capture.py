"""Watch the inputs of linear layers while a denoiser runs, and run it as in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def capture_inputs(
    denoiser: nn.Module, names: Iterable[str], receive: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Hand the input of every named layer to `receive(name, x)` at each call.

    The hooks are removed whatever happens inside the block.
    """
    handles = []
    try:
        for name in names:

            def hook(module: nn.Module, args: tuple, name: str = name) -> None:
                receive(name, args[0])

            handles.append(denoiser.get_submodule(name).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(denoiser: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and back in its own mode afterwards."""
    modes = [(module, module.training) for module in denoiser.modules()]
    denoiser.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
