"""How much memory a call takes beside the weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that a call holds at once beside what was there before.

    On CUDA the allocator tells. Elsewhere the storages that operators return are counted while
    they live: what an operator takes for itself inside is not, nor what compiled code allocates.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Storages() as storages:
        call()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Count the bytes of storages that came up and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in pytree.tree_leaves((args, kwargs)):
            self._see(tensor, given=True)
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            self._see(tensor, given=False)
        return result

    def _see(self, tensor: Any, given: bool) -> None:
        if not torch.is_tensor(tensor):
            return
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._known or not size:
            return
        self._known.add(address)
        if given:  # it was there before: a weight, or an input
            return
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.held -= size
