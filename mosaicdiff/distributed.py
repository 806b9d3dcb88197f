"""Several processes that prune one model together, one on each device.

Under `torchrun` or `accelerate launch` every process holds the model and makes the same calls:
calibration batches are shared out and their sums added up, layers are shared out and their
solutions exchanged. All processes end with the same result; the first one writes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """The processes at work, and which of them this is."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """Join the processes that a launcher started; one alone where there is none.

        A process group that the caller has made is used; otherwise, where the launcher's
        variables (`RANK`, `WORLD_SIZE`) are there, one is made: gloo for tensors on the CPU, NCCL
        for those on GPUs.
        """
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or "RANK" not in os.environ:
                return cls()
            gpu = torch.cuda.is_available()
            if gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.rank == 0

    def mine(self, index: int) -> bool:
        """Tell whether the piece of work of this number is this process's."""
        return index % self.size == self.rank

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over the processes."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def any(self, value: bool) -> bool:
        """Tell whether a statement is true in one of the processes."""
        held = torch.tensor(float(value))
        self.sum_(held)
        return bool(held > 0)

    def merged(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return what all processes hold, by name; each name is held by one of them."""
        if self.size == 1:
            return dict(values)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, dict(values))
        return {name: value for part in parts for name, value in part.items()}

    def from_first(self, value: Value) -> Value:
        """Return the first process's value in all of them."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]
