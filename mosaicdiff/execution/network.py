"""One network in fused execution: what is checked before each call, and how it is run."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .fusion import Forward, Fusion
from .graphs import GraphRunner
from .once import OncePerCall


class Network:
    """Stand in front of a network's forward.

    Args:
        model: a dense denoiser, or one stage.
        fusion: how it is run; an empty one runs it as it is.
        compile: options of `torch.compile`, or None.
        cuda_graphs: whether to capture a graph for each shape of inputs.
    """

    def __init__(
        self, model: nn.Module, fusion: Fusion, compile: dict[str, Any] | None, cuda_graphs: bool
    ) -> None:
        self._model, self.fusion = model, fusion
        for product in fusion.products:
            fusion.held += product.places
        own = types.MethodType(type(model).forward, model)
        forward: Forward = fusion.forward or own
        if fusion.once:
            forward = _OneCall(forward, fusion.once).forward
        self.run: Forward = forward if compile is None else _compiled(forward, compile)
        self.compiled = compile is not None
        self._graphs = GraphRunner(self.run) if cuda_graphs else None
        self._captured: list[int] = []
        #: Pipelines read what a denoiser takes.
        self.__signature__ = inspect.signature(own)
        self._joined: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Who compiles this from outside watches the tensors by guards of its own.
        if not torch.compiler.is_compiling():
            self._check_call()
            changed = self.refresh()
            if self._graphs is not None:
                # A graph reads weights where they were: also those that no product joins.
                places = [parameter.data_ptr() for parameter in self._model.parameters()]
                if changed or places != self._captured:
                    self._graphs.clear()
                    self._captured = places
                return self._graphs(*args, **kwargs)
        return self.run(*args, **kwargs)

    @property
    def forwards(self) -> list[tuple[nn.Module, Forward]]:
        """Modules and what runs in the place of their own `forward`, the network itself last."""
        return [*self.fusion.forwards, (self._model, self)]

    def refresh(self) -> bool:
        """Follow weights that were moved or replaced; whether any was.

        Raises:
            RuntimeError: what was equal is no longer, or a layer was replaced.
        """
        changed = False
        self.fusion.check_held()
        for product in self.fusion.products:
            product.refresh()
        # Counted, since another stage may have joined again what this one shares.
        joined = [product.joined for product in self.fusion.products]
        if joined != self._joined:
            changed, self._joined = True, joined
        for equal in self.fusion.equal:
            if not equal.unchanged():
                changed = True
                if not equal.accept():
                    raise RuntimeError(
                        "optimize: embedders that were equal were changed and differ now. Call "
                        "mosaicdiff.restore and optimize again."
                    )
        return changed

    @property
    def captures(self) -> bool:
        """Whether it is run as CUDA graphs."""
        return self._graphs is not None

    def release(self, follower: Network | None = None) -> None:
        """Let go of joined tensors and graphs, of a stage that is put away.

        Args:
            follower: the stage that comes; what it uses too stays.
        """
        kept = [] if follower is None else follower.fusion.products
        for product in self.fusion.products:
            if not any(product is other for other in kept):
                product.release()
        if self._graphs is not None:
            self._graphs.clear()

    def _check_call(self) -> None:
        if self._model.training:
            raise RuntimeError(
                "optimize: the model must be in evaluation mode, but it is training. Call eval(), "
                "or mosaicdiff.restore to train it."
            )
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._model.parameters()):
            raise RuntimeError(
                "optimize: fused execution gives parameters no gradients, but they are asked for. "
                "Call it inside torch.no_grad(), as pipelines do, or mosaicdiff.restore."
            )


class _OneCall:
    """Run a forward, and let go of what was computed once for all of it.

    Args:
        forward: of a network.
        once: what its modules ask.
    """

    def __init__(self, forward: Forward, once: Sequence[OncePerCall]) -> None:
        self._forward, self._once = forward, once

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        try:
            return self._forward(*args, **kwargs)
        finally:
            for found in self._once:
                found.clear()


def _compiled(forward: Forward, options: dict[str, Any]) -> Callable[..., Any]:
    """Compile a bound method with a code object of its own.

    torch keeps its compiled graphs by code object, eight of each at most: networks that share
    one would push each other out.
    """
    function: Any = getattr(forward, "__func__", forward)
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    owner = getattr(forward, "__self__", None)
    bound = own if owner is None else types.MethodType(own, owner)
    return torch.compile(bound, **options)
