"""CUDA graphs: one a network and shape of inputs, replayed with the inputs copied in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

#: Calls before a capture: libraries choose their kernels and reserve memory in the first ones.
WARM_UP = 3

#: Runs a function as a graph: given it, returns what replays it.
Capture = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]


class GraphRunner:
    """Call a function through CUDA graphs.

    Tensors among the arguments are copied into memory of the graph's own, so that it sees other
    values at each replay; every other value is part of the graph. Results are copied out: guidance
    in two calls must not overwrite the first.

    Args:
        function: that reads its tensors on one CUDA device and never waits for it.
        capture: records a function and returns its result and what replays it.
        most: graphs kept; a further shape is refused, since each holds memory.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        capture: Capture | None = None,
        most: int = 16,
    ) -> None:
        self._function, self._most = function, most
        self._capture = capture or capture_cuda
        self._graphs: dict[Any, tuple[list[torch.Tensor], Any, Callable[[], None]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        key = (structure, tuple(_kind(leaf) for leaf in leaves))
        if key not in self._graphs:
            if len(self._graphs) >= self._most:
                raise RuntimeError(
                    f"optimize: cuda_graphs keeps at most {self._most} shapes of inputs a stage, "
                    "and this is another. Call in fewer batch sizes and picture sizes, or without "
                    "cuda_graphs."
                )
            self._graphs[key] = self._record(leaves, structure)
        inputs, output, replay = self._graphs[key]
        for held, given in zip(inputs, _tensors(leaves), strict=True):
            held.copy_(given)
        replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, output)

    def clear(self) -> None:
        """Forget every graph: its weights are no longer where they were."""
        self._graphs.clear()

    def _record(
        self, leaves: list[Any], structure: Any
    ) -> tuple[list[torch.Tensor], Any, Callable[[], None]]:
        held = [leaf.clone() if torch.is_tensor(leaf) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(held, structure)

        def call() -> Any:
            return self._function(*args, **kwargs)

        output, replay = self._capture(call)
        return _tensors(held), output, replay


def capture_cuda(call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Record a call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return output, graph.replay


def _tensors(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if torch.is_tensor(leaf)]


def _kind(leaf: Any) -> Any:
    if torch.is_tensor(leaf):
        return (tuple(leaf.shape), leaf.dtype, leaf.device)
    return leaf
