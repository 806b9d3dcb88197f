"""Text encoders out of the way once texts are encoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

#: Components that only encode what a pipeline is asked.
_ENCODERS = ("text_encoder", "image_encoder")


def encoders(pipe: Any) -> dict[str, nn.Module]:
    """Return the encoders of a pipeline that lie on an accelerator and may be moved, by name.

    Those that a hook of accelerate places (offloading, a device map) stay: it moves them itself.
    """
    return {
        name: module
        for name, module in pipe.components.items()
        if name.startswith(_ENCODERS)
        and isinstance(module, nn.Module)
        and not hasattr(module, "_hf_hook")
        and getattr(module, "hf_device_map", None) is None
        and next(module.parameters()).device.type not in ("cpu", "meta")
    }


@contextmanager
def encoders_at_rest(pipe: Any) -> Iterator[None]:
    """Keep a pipeline's text encoders in main memory while a block runs, and put them back.

    What is freed is their share of an accelerator's memory; on the CPU nothing is.

    Args:
        pipe: None leaves everything where it is.
    """
    moved = {} if pipe is None else encoders(pipe)
    homes = {name: next(module.parameters()).device for name, module in moved.items()}
    try:
        for module in moved.values():
            module.to("cpu")
        yield
    finally:
        for name, module in moved.items():
            module.to(homes[name])
