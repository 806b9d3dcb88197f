"""How many layers of a batch fit into memory at once."""

from pathlib import Path

import torch


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device; None where nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    info = Path("/proc/meminfo")
    if device.type == "cpu" and info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def layers_at_once(
    name: str, batch: int, layer_bytes: int, device: torch.device, max_bytes: int | None
) -> int:
    """Return how many layers of a batch to work on at a time, at least 1.

    Args:
        name: the public function, for messages.
        batch: layers.
        layer_bytes: what one of them needs beside its inputs.
        device: where they are.
        max_bytes: the caller's limit; None for what is free.

    Raises:
        ValueError: one layer does not fit into ``max_bytes``.
        RuntimeError: one layer does not fit into what is free.
    """
    if max_bytes is not None and layer_bytes > max_bytes:
        raise ValueError(
            f"{name}: max_bytes must be at least {layer_bytes}, which one layer needs, got "
            f"{max_bytes}. Raise it, leave it out, or work on a device with more memory."
        )
    limit = available_bytes(device) if max_bytes is None else max_bytes
    if limit is None:
        return batch
    if layer_bytes > limit:
        raise RuntimeError(
            f"{name}: a layer needs {layer_bytes / 2**30:.2f} GiB beside its weights and H, got "
            f"{limit / 2**30:.2f} GiB free on {device}. Free memory there, or move the layer to "
            "the CPU."
        )
    return min(batch, limit // layer_bytes)
