"""diffusers' caches on a staged denoiser: every stage is hooked for itself and keeps its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers import hooks
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context
from torch import nn

from ..adapters.dit import BiasOnlyBlock
from ..adapters.joint import JointBiasOnlyBlock
from .own_modules import OwnModules

#: Each technique with what puts it onto a model.
_TECHNIQUES: dict[str, Callable[[nn.Module, Any], None]] = {
    "FasterCacheConfig": hooks.apply_faster_cache,
    "FirstBlockCacheConfig": hooks.apply_first_block_cache,
    "MagCacheConfig": hooks.apply_mag_cache,
    "PyramidAttentionBroadcastConfig": hooks.apply_pyramid_attention_broadcast,
    "TaylorSeerCacheConfig": hooks.apply_taylorseer_cache,
}

#: Techniques that skip whole blocks, by the outputs of the first and of the last one.
_BY_BLOCKS = ("FirstBlockCacheConfig", "MagCacheConfig")

#: Techniques that keep one memory for all calls of a step, whatever their context.
_ONE_MEMORY = ("FasterCacheConfig", "PyramidAttentionBroadcastConfig")

#: Families whose pipelines call the denoiser once a step and name no context.
_ONE_CALL = (
    "DiTTransformer2DModel",
    "Flux2Transformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "UNet2DConditionModel",
)

#: Families whose blocks return None or tuples beside tensors.
_TUPLES = ("SD3Transformer2DModel", "UNet2DConditionModel")


class StageCaches:
    """A cache that is switched on in every stage of a denoiser.

    Args:
        stages: of the denoiser.
        base_class: diffusers' name of what they were made from.
        config: of one of diffusers' techniques.

    Raises:
        ValueError: the technique does not work on this denoiser; nothing is changed.
    """

    def __init__(self, stages: Sequence[nn.Module], base_class: str, config: Any) -> None:
        _register_blocks()
        _check(stages, base_class, config)
        self.config, self._stages = config, list(stages)
        self.names_itself = base_class in _ONE_CALL
        self.one_memory = type(config).__name__ in _ONE_MEMORY
        self._roots = [dict(stage.__dict__) for stage in stages]
        self._own = OwnModules(stages)
        before = [_hooks_of(stage) for stage in stages]
        self._added: list[list[tuple[HookRegistry, str]]] = []
        try:
            for stage, known in zip(stages, before, strict=True):
                # Counted from the registries, so that what a failed call left behind counts too.
                self._added.append([])
                try:
                    _TECHNIQUES[type(config).__name__](stage, config)
                finally:
                    self._added[-1] = [h for h in _hooks_of(stage) if h not in known]
                if not self._added[-1]:
                    raise ValueError(
                        f"enable_cache: config must name layers of {base_class}, but "
                        f"{type(config).__name__} found none. Give it their identifiers."
                    )
        except Exception:
            self.remove()
            raise
        self._own.keep_where(_has_registry)
        for stage in stages:
            _forget_registries(stage)

    def remove(self) -> None:
        """Take the cache away from every stage, and let them share their modules again."""
        for added in self._added:
            for registry, name in reversed(added):
                registry.remove_hook(name, recurse=False)
        for stage, before in zip(self._stages, self._roots, strict=True):
            for module in stage.modules():
                _without_empty_registry(module)
            if "_diffusers_hook" not in stage.__dict__ and "forward" not in before:
                stage.__dict__.pop("forward", None)
        self._own.restore()
        for stage in self._stages:
            _forget_registries(stage)

    def reset(self, stage: int) -> None:
        """Let a stage forget what it cached: its next call is computed in full."""
        HookRegistry.check_if_exists_or_initialize(self._stages[stage]).reset_stateful_hooks()

    def set_context(self, stage: int, context: CacheContext | None) -> None:
        """Tell a stage's hooks which call of a step comes."""
        _set_cache_context(self._stages[stage], context)


def check_execution(execution: Any, config: Any) -> None:
    """Refuse a cache that fused execution goes past: it calls blocks, but not what is in them.

    Args:
        execution: that the denoiser is in; None where it is in none.

    Raises:
        ValueError: names the technique, or that the blocks are not called at all.
    """
    if execution is None:
        return
    technique = type(config).__name__
    reason = None
    if technique not in _BY_BLOCKS:
        reason = "fused execution does not call the layers that it hooks"
    elif any(network.captures or network.compiled for network in execution.networks):
        reason = "compiled and captured networks do not call their blocks"
    if reason is not None:
        raise ValueError(
            f"enable_cache: config must be another than {technique} while the model is optimized: "
            f"{reason}. Call mosaicdiff.restore first."
        )


def _check(stages: Sequence[nn.Module], base_class: str, config: Any) -> None:
    """Refuse, with the reason, what would fail inside or give wrong numbers.

    Raises:
        ValueError: see above.
    """
    technique = type(config).__name__
    several = len(stages) > 1
    reason = None
    if technique not in _TECHNIQUES:
        known = ", ".join(sorted(_TECHNIQUES))
        raise ValueError(
            f"enable_cache: config must be one of {known}, got {technique}: it was made for "
            "models that mosaicdiff does not prune."
        )
    if technique in _BY_BLOCKS and any(len(_blocks_of(stage)) < 2 for stage in stages):
        reason = "it needs a list of at least two transformer blocks. For U-Nets use DeepCache"
    elif technique in _BY_BLOCKS and base_class == "SD3Transformer2DModel":
        reason = "the last block returns no text, which its hook reads. Use TaylorSeerCacheConfig"
    elif technique in _BY_BLOCKS and not all(map(_known_blocks, stages)):
        reason = "diffusers does not know what its blocks return. Use TaylorSeerCacheConfig"
    elif getattr(config, "use_lite_mode", False) and base_class in _TUPLES:
        reason = "its blocks return more than tensors. Leave use_lite_mode out"
    elif several and technique == "MagCacheConfig":
        reason = "its ratios count the steps of a whole run, of which a stage sees a part"
    elif several and technique == "FasterCacheConfig":
        reason = "it extrapolates from steps before, of which a new stage has none"
    elif several and getattr(config, "disable_cache_after_step", None) is not None:
        reason = "disable_cache_after_step counts the steps of a run, of which a stage sees a part"
    if reason is not None:
        kind = f"{base_class} in {len(stages)} stages" if several else base_class
        raise ValueError(
            f"enable_cache: config must be another than this {technique} for {kind}: {reason}."
        )
    for stage in stages:
        for name, module in stage.named_modules():
            if getattr(module, "_compiled_call_impl", None) is not None:
                raise ValueError(
                    f"enable_cache: {name or base_class} must not be compiled yet, but it is. "
                    "Enable the cache first and compile afterwards."
                )


def _blocks_of(stage: nn.Module) -> list[nn.Module]:
    return [
        block
        for name, child in stage.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, nn.ModuleList)
        for block in child
    ]


def _known_blocks(stage: nn.Module) -> bool:
    TransformerBlockRegistry._register()
    return all(type(block) in TransformerBlockRegistry._registry for block in _blocks_of(stage))


def _register_blocks() -> None:
    """Tell diffusers what our stand-ins for whole blocks take and return."""
    TransformerBlockRegistry.register(
        BiasOnlyBlock,
        TransformerBlockMetadata(return_hidden_states_index=0),
    )
    TransformerBlockRegistry.register(
        JointBiasOnlyBlock,
        TransformerBlockMetadata(
            return_hidden_states_index=1, return_encoder_hidden_states_index=0
        ),
    )


def _hooks_of(stage: nn.Module) -> list[tuple[HookRegistry, str]]:
    registries = [m.__dict__["_diffusers_hook"] for m in stage.modules() if _has_registry(m)]
    return [(registry, name) for registry in registries for name in registry._hook_order]


def _has_registry(module: nn.Module) -> bool:
    return "_diffusers_hook" in module.__dict__


def _without_empty_registry(module: nn.Module) -> None:
    """Take away a registry without hooks, and the `forward` that it put into the instance."""
    if not _has_registry(module) or module.__dict__["_diffusers_hook"].hooks:
        return
    del module.__dict__["_diffusers_hook"]
    forward: Any = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]


def _forget_registries(stage: nn.Module) -> None:
    """Drop the lists of hooked modules that diffusers keeps, which are out of date."""
    for module in stage.modules():
        if _has_registry(module):
            module.__dict__["_diffusers_hook"]._child_registries_cache = None
