"""What the machine has."""

from __future__ import annotations

import os

import torch


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a CUDA device, or else in the machine.

    Where the system does not say what is free, half of what there is.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:  # not Linux
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
