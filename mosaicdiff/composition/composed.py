"""What a staged denoiser answers to the techniques that pipelines know."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks.hooks import CacheContext
from torch import nn

from ..groups import leading_parameter
from ..model_checks import EXECUTION, check_not_optimized
from .caching import StageCaches, check_execution
from .hindrances import check_plain_weights, check_resident

if TYPE_CHECKING:
    from ..runtime import StageInfo
    from ..trajectory.clock import StageClock
    from .lora import LoadedLoras

_CPU = torch.device("cpu")


class Composed:
    """Methods of a staged denoiser that hand caches on to its stages.

    A stage that is entered begins with empty caches, so that its first step is computed in full:
    nothing of another stage, or of another picture, is reused.
    """

    info: StageInfo
    stage_models: nn.ModuleList
    _clock: StageClock
    _caches: StageCaches | None = None
    _loras: LoadedLoras | None = None
    _context: CacheContext | None = None
    #: Name of the calls, of a cache that must see no other.
    _one_context: str | None = None
    #: Stage and run of the last call.
    _entered: tuple[int, Any] | None = None
    #: Called with a stage when a call enters it; a tuple, as the class holds it.
    _on_entry: tuple[Callable[[int], None], ...] = ()

    @property
    def is_cache_enabled(self) -> bool:
        """Whether one of diffusers' caches is on."""
        return self._caches is not None

    def enable_cache(self, config: Any) -> None:
        """Switch one of diffusers' caches on in every stage, also of families that it is not in.

        The first step of each stage is computed in full. Where the pipeline does not say which of
        several calls of a step comes (DiT, PixArt, Sana, SD3, FLUX.2), each call is taken for the
        only one: a loop of your own that makes two goes around each with `cache_context`.

        Args:
            config: `FirstBlockCacheConfig` (also on top of `mosaicdiff.optimize`),
                `PyramidAttentionBroadcastConfig`, `TaylorSeerCacheConfig`; of one stage
                `MagCacheConfig` and `FasterCacheConfig` too.

        Raises:
            ValueError: a cache is on already, or the technique does not work on this denoiser.
        """
        if self._caches is not None:
            raise ValueError(
                "enable_cache: no cache must be on, got "
                f"{type(self._caches.config).__name__}. Call disable_cache() first."
            )
        check_execution(self.__dict__.get(EXECUTION), config)
        check_resident(self, "enable_cache")
        self._caches = StageCaches(list(self.stage_models), self.info.base_class, config)
        self._entered = None

    def disable_cache(self) -> None:
        """Switch the cache off in every stage, which are as before; warns where none is on."""
        if self._caches is None:
            warnings.warn("disable_cache: no cache is on, so none was switched off.", stacklevel=2)
            return
        self._caches.remove()
        self._caches = None

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: tuple[str, ...] | None = None,
        skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Store the layers in `storage_dtype` and compute in `compute_dtype`, as diffusers does.

        The same layers are left out as of the dense model; what stages share is cast once.

        Args:
            storage_dtype: of the weights between calls.
            compute_dtype: of the weights in a call; None means the type that they have.
            skip_modules_pattern: regular expressions of names; None means diffusers' own.
            skip_modules_classes: classes to leave as they are.
            non_blocking: whether casts are waited for.

        Raises:
            ValueError: the weights are quantised, cast or offloaded already.
        """
        from .storage import cast_layerwise

        check_not_optimized(self, "enable_layerwise_casting")
        check_resident(self, "enable_layerwise_casting")
        check_plain_weights(self, "enable_layerwise_casting")
        compute_dtype = leading_parameter(self).dtype if compute_dtype is None else compute_dtype
        cast_layerwise(
            list(self.stage_models), storage_dtype, compute_dtype, skip_modules_pattern,
            skip_modules_classes, non_blocking,
        )  # fmt: skip

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_device: torch.device = _CPU,
        offload_type: str = "block_level",
        **kwargs: Any,
    ) -> None:
        """Keep layers off the device between their calls, as diffusers does, leaf by leaf.

        Args:
            onload_device: where layers are called.
            offload_device: where they are between calls.
            offload_type: `leaf_level`.
            kwargs: as of diffusers' models.

        Raises:
            ValueError: another type; diffusers would take a whole stage for a block.
        """
        if offload_type != "leaf_level":
            raise ValueError(
                "enable_group_offload: offload_type must be 'leaf_level' where the model is "
                f"pruned, got {offload_type!r}: stages share blocks, and diffusers would move a "
                "whole stage for each."
            )
        check_not_optimized(self, "enable_group_offload")
        check_resident(self, "enable_group_offload")
        parent: Any = super()
        parent.enable_group_offload(onload_device, offload_device, offload_type, **kwargs)

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what the pipeline's own `load_lora_weights` calls.

        Raises:
            ValueError: says what to call instead.
        """
        raise ValueError(
            "load_lora_weights: model must be dense, but it is pruned: its layers are narrower "
            "than the LoRA. Call mosaicdiff.load_lora(pipe, ...), which slices it."
        )

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Forget what was cached, as pipelines ask at the end of a run."""
        self._entered = self._one_context = None
        if self._caches is not None:
            for stage in range(len(self.stage_models)):
                self._caches.reset(stage)

    @contextmanager
    def cache_context(self, name: str, **details: Any) -> Iterator[None]:
        """Say to the hooks of every stage which call of a step comes; pipelines ask for it.

        Raises:
            ValueError: the cache that is on cannot tell the calls of a step apart.
        """
        self._check_context(name)
        self._context = CacheContext(name, **details)
        try:
            with ExitStack() as stack:
                for stage in self.stage_models:
                    context: Any = getattr(stage, "cache_context", None)
                    if context is not None:
                        stack.enter_context(context(name, **details))
                    elif self._caches is not None:
                        index = list(self.stage_models).index(stage)
                        self._caches.set_context(index, self._context)
                        stack.callback(self._caches.set_context, index, None)
                yield
        finally:
            self._context = None

    def _check_context(self, name: str) -> None:
        if self._caches is None or not self._caches.one_memory:
            return
        if self._one_context not in (None, name):
            raise ValueError(
                f"{type(self._caches.config).__name__}: all calls of a run must be of one context, "
                f"got {self._one_context!r} and {name!r}: it keeps one memory, and would hand the "
                "attention of one to the other. Sample without guidance, or use "
                "FirstBlockCacheConfig or TaylorSeerCacheConfig."
            )
        self._one_context = name

    @torch.compiler.disable
    def _enter(self, stage: int) -> None:
        """Prepare a call of a stage: where it is another than before, it forgets."""
        if self._caches is None and not self._on_entry:
            return
        place = (stage, self._clock.run)
        entered = self._entered
        if entered is None or entered[0] != stage or entered[1] is not place[1]:
            self._entered = place
            for listener in self._on_entry:
                listener(stage)
            if self._caches is not None:
                self._caches.reset(stage)
                self._caches.set_context(stage, self._context)
        if self._caches is not None and self._caches.names_itself and self._context is None:
            self._caches.set_context(stage, CacheContext("call"))
