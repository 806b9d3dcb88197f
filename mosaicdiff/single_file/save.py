"""Write a staged denoiser in the layout of the file that its model came in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..adapters import adapter_for_class
from ..checkpoint import config_of, storage_of
from ..files import current_umask
from .assembly import arrange, dense_name, slots_of
from .layout import Layout, conversion_of, derive_layout
from .plan import KEY, VERSION, pack_kept, read_header

if TYPE_CHECKING:
    from ..runtime import StagedDenoiser

#: Types that a file may have its weights in, as safetensors calls them.
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def save_single_file(
    staged: StagedDenoiser,
    path: str | Path,
    *,
    source: str | Path,
    config: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a pruned denoiser as one `.safetensors` in the layout of the file it was pruned from.

    Its tensors get the names, the order of rows and the types they have in `source`; all that is
    no part of the denoiser (VAE, text encoders) is copied byte for byte. See
    docs/single-file-format.md.

    Args:
        staged: what `prune` returned.
        path: the new file, `.safetensors`.
        source: the dense file that the model was loaded from.
        config: folder or Hub id that `load_single_file_pipeline` takes the rest of the pipeline
            from where it is given none; noted in the file.
        overwrite: replace `path` where it is there.

    Raises:
        ValueError: `path` exists, or `source` is not the file of this model.
    """
    target, origin = Path(path), Path(source)
    check_target(target, overwrite)
    layout = check_source(origin, staged.info.base_class, staged.info.base_config)
    tensors, storage, aliases = storage_of(staged)
    kept = {name: tensors.pop(name) for name in list(tensors) if name.startswith("kept.")}
    assembly = arrange(layout, slots_of(staged.info.layers, layout), tensors)
    header, metadata = read_header(origin)
    groups = {layer.name: layer.groups for layer in staged.info.layers}
    plan = {
        "version": VERSION,
        "checkpoint": config_of(staged, storage, aliases),
        "kept": {name: pack_kept(of, groups[name.split(".", 2)[2]]) for name, of in kept.items()},
        "tensors": {name: made_of.to_json(tensors) for name, made_of in assembly.items()},
        "report": staged.info.report,
        "pipeline": _place(config),
    }
    with safe_open(origin, framework="pt") as file:
        made: dict[str, torch.Tensor] = {}
        for name in header:
            if name not in layout:
                made[name] = file.get_tensor(name)
        for name, made_of in assembly.items():
            dense, joined = dense_name(name), made_of.join(tensors)
            if dense not in header:  # masks, and what is left of masked weights
                made[name] = joined.contiguous()
                continue
            made[name] = _as_in_source(joined, file.get_tensor(dense) if name == dense else None,
                                       _TYPES[header[dense][1]])  # fmt: skip
        _write(made, target, metadata | {"format": "pt", KEY: json.dumps(plan)})


def check_source(path: Path, base_class: str, base_config: dict[str, Any]) -> Layout:
    """Find what the tensors of a dense single file are made of, or say why nothing fits.

    Raises:
        ValueError: it is pruned, quantised, or of another model.
    """
    header, metadata = read_header(path)
    if KEY in metadata:
        raise ValueError(
            f"single file: source must be dense, but {path} is pruned already. Name the file that "
            "it was pruned from."
        )
    convert = conversion_of(base_class)
    base = adapter_for_class(base_class).empty(base_config)
    parameters = {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}
    shapes = {name: shape for name, (shape, _) in header.items()}
    layout = derive_layout(convert, dict(base_config), parameters, shapes)
    for name in layout:
        if header[name][1] not in _TYPES:
            raise ValueError(
                f"single file: source must hold {', '.join(_TYPES)} weights, got "
                f"{header[name][1]} in {name}. Prune before quantising: name a file in 16 or 32 "
                "bits."
            )
    return layout


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a path that no single file can be written to.

    Raises:
        ValueError: it is a folder, has another suffix, or is there and may not be replaced.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"save_single_file: path must end in .safetensors, got {path}.")
    if path.is_dir():
        raise ValueError(f"save_single_file: path must be a file, but {path} is a folder.")
    if path.exists() and not overwrite:
        raise ValueError(
            f"save_single_file: path must be new, but {path} is there. Choose another name, or "
            "pass overwrite=True (--overwrite) to replace it."
        )


def _place(config: str | Path | None) -> str | None:
    """Return a Hub id as it is, and a folder so that it is found from elsewhere."""
    if config is None:
        return None
    return str(Path(config).absolute()) if Path(config).is_dir() else str(config)


def _as_in_source(
    tensor: torch.Tensor, dense: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Bring a tensor to the file's type; one that did not change keeps the source's bytes.

    A model may have been loaded in fewer bits than its file has.
    """
    tensor = tensor.detach().cpu()
    if dense is not None and dense.shape == tensor.shape:
        if torch.equal(dense.to(tensor.dtype), tensor):
            return dense
    return tensor.to(dtype).contiguous()


def _write(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(0o666 & ~current_umask())  # safetensors makes it readable to its owner alone
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
