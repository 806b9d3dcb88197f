"""States of a denoiser that cannot be pruned exactly, and what undoes them.

Fine as they are: training mode, gradient checkpointing, a chosen attention backend, model and group
offloading, weights that a LoRA was fused into and then unloaded from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

#: diffusers' hooks that only move weights, by a part of their names.
_MOVING_HOOKS = ("group_offloading", "layer_execution_tracker")
_CASTING_HOOK = "layerwise_casting"

#: Where a denoiser holds the fused execution that it is in.
EXECUTION = "_mosaicdiff_execution"

#: A part of a processor's class name, what it is, and what takes it away.
_KNOWN_PROCESSORS = (
    ("IPAdapter", "an IP-Adapter is loaded", "Call the pipeline's unload_ip_adapter() first."),
    ("Sliced", "attention is sliced", "Call disable_attention_slicing() first."),
    (
        "XFormers", "xFormers computes attention",
        "Call disable_xformers_memory_efficient_attention() first.",
    ),
    ("PAG", "perturbed attention guidance is on", "Load the model without it, and prune that."),
    ("Fused", "projections are fused", "Load the model again, prune, and fuse afterwards."),
)  # fmt: skip


def check_not_optimized(denoiser: Any, caller: str) -> None:
    """Refuse a denoiser in fused execution, whose forwards go past what `caller` would change.

    Raises:
        ValueError: it is in fused execution.
    """
    if EXECUTION in denoiser.__dict__:
        raise ValueError(f"{caller}: model must not be optimized. Call mosaicdiff.restore first.")


def check_state(
    denoiser: Any,
    processors: Collection[str] = (),
    grouped_kv: bool = False,
    caller: str = "prune",
) -> None:
    """Refuse a denoiser that is something else than its plain dense self.

    Args:
        denoiser: on any device.
        processors: class names of the attention processors that are understood; of none, any is.
        grouped_kv: whether key and value heads may be fewer than query heads.
        caller: named in errors.

    Raises:
        ValueError: names what is found, where, and what undoes it.
    """
    for problem in (*_of_wrappers(denoiser), *_of_adapters(denoiser), *_of_hooks(denoiser),
                    *_of_quantisation(denoiser), *_of_attention(denoiser, processors)):  # fmt: skip
        raise ValueError(f"{caller}: {problem}")
    if not grouped_kv:
        _check_kv_heads(denoiser)


def check_unhooked(caller: str, denoiser: Any) -> None:
    """Refuse a denoiser whose modules run through hooks that keep or replace a `forward`.

    Raises:
        ValueError: names the module, and what takes the hook away.
    """
    for name, module in denoiser.named_modules():
        where = name or type(denoiser).__name__
        hooks = list(getattr(getattr(module, "_diffusers_hook", None), "hooks", {}))
        if "_hf_hook" in module.__dict__:
            hooks.append("offloading")
        if hooks:
            raise ValueError(
                f"{caller}: {where} must be without hooks, but {hooks[0]} is on. Take it off first "
                "(disable_cache() where it is a cache), or load the model again; after "
                "mosaicdiff.optimize it may go on."
            )


def check_shapes(denoiser: Any, dense: Mapping[str, torch.Tensor]) -> None:
    """Hold a denoiser's tensors to those of a dense one of its configuration.

    Args:
        denoiser: of any state that `check_state` lets pass.
        dense: state of the dense one, on any device.

    Raises:
        ValueError: a shape differs, or a tensor is missing or too many.
    """
    held = denoiser.state_dict()
    for name, tensor in dense.items():
        if name not in held:
            raise ValueError(
                f"prune: model must hold {name}, as its configuration says, but it does not. Was a "
                "part of it replaced? Load it again."
            )
        if held[name].shape != tensor.shape:
            raise ValueError(
                f"prune: {name} must be {tuple(tensor.shape)}, as its configuration says, got "
                f"{tuple(held[name].shape)}. Was it pruned by other means? Prune the original."
            )
    extra = [name for name in held if name not in dense]
    if extra:
        raise ValueError(
            f"prune: model must be what its configuration says, but it holds {extra[0]} besides. "
            "Load it again without what was added."
        )


def _of_wrappers(denoiser: Any) -> Iterator[str]:
    kind = type(denoiser).__name__
    if EXECUTION in denoiser.__dict__:
        yield "model must not be optimized. Call mosaicdiff.restore first, and optimize the stages."
    if kind == "StagedDenoiser":
        yield "model must be dense, but it is pruned already. Prune the original instead."
    if kind == "OptimizedModule" or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in denoiser.modules()
    ):
        # Measured: a hook put on a compiled module is not called, so nothing would be seen.
        yield (
            "model must not be compiled: what its layers are given cannot be seen then. Prune it "
            "before, and compile the stages afterwards."
        )
    if getattr(denoiser, "_parallel_config", None) is not None:
        yield (
            "model must not be divided between devices (context or tensor parallel). Load it "
            "whole; start several processes with torchrun to share the work."
        )


def _of_adapters(denoiser: Any) -> Iterator[str]:
    # Fusing alone leaves the adapter's layers around the fused weights.
    cure = "Call fuse_lora() and then unload_lora_weights(), or unload alone, first."
    for name, module in denoiser.named_modules():
        if hasattr(module, "lora_A") or hasattr(module, "base_layer"):
            yield f"{name} must be a plain layer, but an adapter (LoRA) is loaded. {cure}"
    if getattr(denoiser, "_hf_peft_config_loaded", False) or getattr(denoiser, "peft_config", None):
        names = ", ".join(getattr(denoiser, "peft_config", None) or ["?"])
        yield f"model must be without adapters, but an adapter (LoRA) is loaded: {names}. {cure}"


def _of_hooks(denoiser: Any) -> Iterator[str]:
    for name, module in denoiser.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}):
            where = name or type(denoiser).__name__
            if _CASTING_HOOK in hook:
                yield (
                    f"{where} must hold its weights as they were trained, but layerwise casting "
                    "has rounded them. Load the model again, prune, and call "
                    "enable_layerwise_casting() afterwards."
                )
            elif not any(part in hook for part in _MOVING_HOOKS):
                yield (
                    f"{where} must run in every call, but {hook!r} changes what is run. Call "
                    "disable_cache() first, or load the model again without it."
                )


def _of_quantisation(denoiser: Any) -> Iterator[str]:
    cure = "Load the model in 16 or 32 bits, prune, and quantise what comes out."
    quantizer = getattr(denoiser, "hf_quantizer", None)
    settings = getattr(getattr(denoiser, "config", None), "quantization_config", None)
    if quantizer is not None or settings:
        what = type(quantizer).__name__ if quantizer is not None else "quantization_config is set"
        yield f"model must not be quantised, but it is ({what}). {cure}"
    for name, parameter in denoiser.named_parameters():
        kind = next(
            (type(t).__name__ for t in (parameter, parameter.data)
             if type(t) not in (nn.Parameter, torch.Tensor)),
            None,
        )  # fmt: skip
        if kind is not None:
            yield f"{name} must be a plain tensor, but it is quantised or divided: {kind}. {cure}"
        if not parameter.is_floating_point() or parameter.dtype.itemsize == 1:
            dtype = str(parameter.dtype).removeprefix("torch.")
            yield f"{name} must be of 16 or 32 bits, but it is quantised: {dtype}. {cure}"


def _of_attention(denoiser: Any, processors: Collection[str]) -> Iterator[str]:
    for name, module in denoiser.named_modules():
        if getattr(module, "fused_projections", False):
            yield (
                f"{name} must have its own q, k and v projections, but they are fused. Load the "
                "model again, prune, and fuse afterwards: unfuse_qkv_projections() leaves the "
                "fused copies behind."
            )
        kind = type(getattr(module, "processor", None)).__name__
        if not processors or kind == "NoneType" or kind in processors:
            continue
        what, cure = next(
            ((what, cure) for part, what, cure in _KNOWN_PROCESSORS if part in kind),
            ("it is another", "Set the model's own, or prune before you set this one."),
        )
        yield (
            f"the processor of {name} must be {' or '.join(processors)}, but {what}: {kind}. {cure}"
        )


def _check_kv_heads(denoiser: Any) -> None:
    for name, module in denoiser.named_modules():
        heads, width = getattr(module, "heads", None), getattr(module, "inner_dim", None)
        kv_width = getattr(module, "inner_kv_dim", getattr(module, "kv_inner_dim", width))
        if heads and width and kv_width != width:
            raise ValueError(
                f"prune: {name} must have as many key and value heads as query heads, got widths "
                f"of {kv_width} and {width}. Grouped heads are not supported in this family."
            )
