"""Whether a configuration's networks fit into memory, before any is made."""

from __future__ import annotations

import torch

from ..config import PruneConfig
from ..machine import free_bytes
from ..quantities import human_bytes
from .configurations import configuration, random_staged


def networks_bytes(name: str, config: PruneConfig, dtype: torch.dtype) -> int:
    """Count the bytes of a named dense denoiser and of what its stages hold beside it."""
    dense = configuration(name).empty()
    staged = random_staged(dense, config)
    own = {id(p): p for p in (*dense.parameters(), *staged.parameters())}
    return sum(p.numel() for p in own.values()) * dtype.itemsize


def check_room(name: str, config: PruneConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a configuration whose weights alone do not fit.

    Raises:
        ValueError: they do not; says what they take and what is free.
    """
    needed, free = networks_bytes(name, config, dtype), free_bytes(device)
    if needed > free:
        kind = str(dtype).removeprefix("torch.")
        halves = dtype.itemsize > 2 and needed * 2 // dtype.itemsize <= free
        cure = "Pass --dtype bfloat16, or take" if halves else "Take"
        raise ValueError(
            f"bench: {name} must fit into memory, dense beside pruned: in {kind} both take "
            f"{human_bytes(needed)}, but {human_bytes(free)} is free on {device}. {cure} a "
            "device with more."
        )
