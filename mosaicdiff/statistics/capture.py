"""Watch the inputs of linear layers while a denoiser runs, and run it as in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..groups import Columns, input_named


@contextmanager
def capture_inputs(
    denoiser: nn.Module, names: Iterable[str], receive: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Hand every named input (`groups.Columns.name`) to `receive(name, x)` at each call.

    The hooks are removed whatever happens inside the block.
    """
    handles = []
    try:
        for name in names:
            columns = input_named(name)

            def hook(
                module: nn.Module, args: tuple, name: str = name, columns: Columns = columns
            ) -> None:
                # Channels of a convolution come after the rows.
                x = args[0].movedim(1, -1) if isinstance(module, nn.Conv2d) else args[0]
                receive(name, columns.of_input(x))

            module = denoiser.get_submodule(columns.module)
            handles.append(module.register_forward_pre_hook(hook))
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
