"""Read a LoRA in any layout that diffusers knows, as pairs of matrices by dense module."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .lora_slice import LoraPair

#: Where diffusers writes the settings of a LoRA into a file's metadata.
_SETTINGS = "lora_adapter_metadata"

#: Names of one matrix: module, and whether it is the first (down) or the second (up).
_NAMES = (
    re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(\.[^.]+)?\.weight"),
    re.compile(r"(?P<module>.+)\.lora[._](?P<part>down|up)(\.[^.]+)?\.weight"),
    re.compile(r"(?P<module>.+\.)processor\.(?P<old>to_q|to_k|to_v|to_out)_lora\.(?P<part>down|up)\.weight"),
)  # fmt: skip

#: Parts of names of what is more than a low-rank product, and why it cannot be sliced.
_REFUSED = (
    ("dora_scale", "DoRA norms rows over columns that are gone"),
    ("lora_magnitude_vector", "DoRA norms rows over columns that are gone"),
    ("hada_", "a LoHa is no product of two matrices"),
    ("lokr_", "a LoKr is no product of two matrices"),
    ("oft_", "an OFT is no product of two matrices"),
)

LoraSource = str | Path | Mapping[str, torch.Tensor]


def read_lora(
    pipe: Any, component: str, source: LoraSource, weight_name: str | None = None
) -> list[LoraPair]:
    """Read the denoiser's part of a LoRA.

    Args:
        pipe: whose own converter is asked, where it has one (kohya, BFL and other layouts).
        component: that holds the denoiser.
        source: a .safetensors file, a folder with one, or tensors by name.
        weight_name: of the file in the folder.

    Raises:
        ValueError: there is no such file, it holds a text encoder's part, or anything but pairs of
            matrices.
    """
    tensors, settings = _tensors(source, weight_name)
    for name in tensors:
        for part, reason in _REFUSED:
            if part in name:
                raise ValueError(
                    f"load_lora: LoRA must be products of two matrices, got {name}: {reason}. "
                    "Merge it into the dense model, and prune that."
                )
    alphas: dict[str, Any] = {}
    convert = getattr(type(pipe), "lora_state_dict", None)
    if convert is not None:
        tensors, alphas = _converted(pipe, component, tensors)
    return pairs_of(_of_component(tensors | alphas, component), settings, component)


def _tensors(
    source: LoraSource, weight_name: str | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if isinstance(source, Mapping):
        return dict(source), {}
    path = Path(source)
    if path.is_dir():
        found = [path / weight_name] if weight_name else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise ValueError(
                f"load_lora: {path} must hold one .safetensors file, got {names}. Say which by "
                "weight_name."
            )
        path = found[0]
    if not path.is_file() or path.suffix != ".safetensors":
        raise ValueError(
            f"load_lora: source must be a .safetensors file or a folder with one, got {source}. "
            "Download what is on the Hub, and convert pickled files."
        )
    with safe_open(path, framework="pt") as file:
        settings = json.loads((file.metadata() or {}).get(_SETTINGS, "{}"))
    return load_file(path), settings


def _converted(
    pipe: Any, component: str, tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    options: dict[str, Any] = {}
    if component == "unet":
        options["unet_config"] = pipe.unet.config
    elif "Flux" in type(pipe).__name__ and "Flux2" not in type(pipe).__name__:
        options["return_alphas"] = True
    found = pipe.lora_state_dict(dict(tensors), **options)
    if not isinstance(found, tuple):
        return found, {}
    converted, alphas = found[:2]
    return converted, {
        name if name.endswith(".alpha") else f"{name}.alpha": value
        for name, value in (alphas or {}).items()
    }


def _of_component(tensors: Mapping[str, Any], component: str) -> dict[str, Any]:
    """Return what belongs to the denoiser, without the component's name.

    Raises:
        ValueError: something belongs to a text encoder.
    """
    for name in tensors:
        if name.startswith(("text_encoder", "lora_te")):
            raise ValueError(
                f"load_lora: LoRA must be of the denoiser alone, got {name}. Hand the text "
                "encoder's part to the pipeline's own load_lora_into_text_encoder, and the rest "
                "here."
            )
    found = {}
    prefixes = (f"{component}.", "transformer.", "unet.")
    for name, value in tensors.items():
        short = name.removeprefix("base_model.model.")
        for prefix in prefixes:
            if short.startswith(prefix):
                short = short.removeprefix(prefix)
                break
        found[short] = value
    return found


def pairs_of(
    tensors: Mapping[str, Any], settings: Mapping[str, Any] | None = None, component: str = ""
) -> list[LoraPair]:
    """Pair the matrices of a LoRA by module, each with alpha over rank.

    Args:
        tensors: by name, without a component's; `<module>.alpha` beside the matrices.
        settings: as diffusers writes them, for what has no alpha of its own.
        component: whose settings they are.

    Raises:
        ValueError: a name is none of these, or a matrix is missing.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    for name, value in tensors.items():
        match = next((m for m in (p.fullmatch(name) for p in _NAMES) if m), None)
        if match is not None:
            module = match["module"]
            if "old" in match.groupdict():
                module += "to_out.0" if match["old"] == "to_out" else match["old"]
            part = {"A": "down", "B": "up"}.get(match["part"], match["part"])
            parts.setdefault(module, {})[part] = value
        elif name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = float(value)
        else:
            raise ValueError(
                f"load_lora: LoRA must be products of two matrices by module, got {name}. Merge it "
                "into the dense model, and prune that."
            )
    if not parts:
        raise ValueError("load_lora: LoRA must change something of the denoiser, got nothing.")
    pairs = []
    for module, held in parts.items():
        if held.keys() != {"down", "up"}:
            raise ValueError(
                f"load_lora: {module} must have two matrices, got {', '.join(sorted(held))} alone."
            )
        rank = held["down"].shape[0]
        alpha = alphas.get(module)
        scale = _stated(module, rank, settings or {}, component) if alpha is None else alpha / rank
        pairs.append(LoraPair(module, held["down"], held["up"], scale))
    return pairs


def _stated(module: str, rank: int, settings: Mapping[str, Any], component: str) -> float:
    """Return the scale that a file's settings give a module; 1 where they say nothing."""
    own = {
        name.removeprefix(f"{component}."): value
        for name, value in settings.items()
        if not name.startswith("text_encoder")
    }
    alpha = own.get("lora_alpha")
    patterns = own.get("alpha_pattern") or {}
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)
