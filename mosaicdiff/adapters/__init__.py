"""What the engine knows of each denoiser: one file per family, one line here."""

from __future__ import annotations

from typing import Any

from ..model_checks import check_state
from .base import Adapter
from .dit import DiTAdapter
from .flux import FluxAdapter
from .flux2 import Flux2Adapter
from .hunyuan_video import HunyuanVideoAdapter
from .ltx import LTXAdapter
from .pixart import PixArtAdapter
from .qwen import QwenImageAdapter
from .sana import SanaAdapter
from .sd3 import SD3Adapter
from .unet import UNetAdapter
from .wan import WanAdapter

_ADAPTERS: tuple[Adapter, ...] = (
    DiTAdapter(),
    FluxAdapter(),
    Flux2Adapter(),
    HunyuanVideoAdapter(),
    QwenImageAdapter(),
    LTXAdapter(),
    PixArtAdapter(),
    SanaAdapter(),
    SD3Adapter(),
    UNetAdapter(),
    WanAdapter(),
)

#: Class names of the denoisers that can be pruned.
DENOISER_CLASSES = tuple(adapter.denoiser_class for adapter in _ADAPTERS)


def adapter_for(denoiser: Any) -> Adapter:
    """Return the adapter of a denoiser, by its class name.

    Raises:
        ValueError: no adapter knows the class, or something is around the denoiser.
    """
    if type(denoiser).__name__ not in DENOISER_CLASSES:
        check_state(denoiser)
    return adapter_for_class(type(denoiser).__name__)


def adapter_for_class(name: str) -> Adapter:
    """Return the adapter of a denoiser class by name; see `adapter_for`."""
    for adapter in _ADAPTERS:
        if adapter.denoiser_class == name:
            return adapter
    raise ValueError(
        f"adapter_for: denoiser must be one of {', '.join(DENOISER_CLASSES)}, got {name}. "
        "Other families need an adapter in mosaicdiff/adapters."
    )


__all__ = ["DENOISER_CLASSES", "Adapter", "adapter_for", "adapter_for_class"]
