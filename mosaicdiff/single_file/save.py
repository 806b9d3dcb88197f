"""Write a staged denoiser in the layout of the file that its model came in."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..adapters import adapter_for_class
from ..checkpoint import config_of, storage_of
from ..files import current_umask
from .layout import Layout, Run, conversion_of, derive_layout
from .plan import KEY, PREFIX, VERSION, pack_kept, read_header

if TYPE_CHECKING:
    from ..runtime import StagedDenoiser

#: Types that a file may have its weights in, as safetensors calls them.
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
#: Stored names of what all stages share begin with one of these.
_COMMON = ("shared.", "union.")


@dataclass(frozen=True)
class _Part:
    """Rows start..start+rows-1 of a tensor of the checkpoint."""

    stored: str
    start: int
    rows: int


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
    parts = _arrange(layout, tensors)
    header, metadata = read_header(origin)
    groups = {layer.name: layer.groups for layer in staged.info.layers}
    plan = {
        "version": VERSION,
        "checkpoint": config_of(staged, storage, aliases),
        "kept": {name: pack_kept(of, groups[name.split(".", 2)[2]]) for name, of in kept.items()},
        "tensors": {name: _written(of, tensors) for name, of in parts.items()},
        "report": staged.info.report,
        "pipeline": _place(config),
    }
    with safe_open(origin, framework="pt") as file:
        made: dict[str, torch.Tensor] = {}
        for name in header:
            if name not in layout:
                made[name] = file.get_tensor(name)
        for name, of in parts.items():
            dense = _dense_name(name)
            joined = torch.cat([tensors[p.stored][p.start : p.start + p.rows] for p in of])
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


def _arrange(layout: Layout, tensors: dict[str, torch.Tensor]) -> dict[str, list[_Part]]:
    """Say of which rows of which checkpoint tensors each tensor of the file is made.

    A tensor of the file is parted where the stages share some of its parameters and have others
    of their own: each part holds its rows in the file's order.
    """
    spaces: dict[str, dict[str, str]] = defaultdict(dict)
    for stored in tensors:
        prefix, parameter = _space(stored)
        spaces[prefix][parameter] = stored
    dense: dict[str, int] = defaultdict(int)
    for runs in layout.values():
        for run in runs:
            dense[run.parameter] += run.rows
    parts: dict[str, list[_Part]] = {}
    for prefix, held in spaces.items():
        if prefix == PREFIX:
            parts |= {
                PREFIX + stored: [_Part(stored, 0, len(tensors[stored]))]
                for stored in held.values()
            }
            continue
        for name, runs in layout.items():
            of = [
                _part(run, name, held[run.parameter], tensors, dense[run.parameter])
                for run in runs
                if run.parameter in held
            ]
            if of:
                parts[prefix + name] = of
    return parts


def _space(stored: str) -> tuple[str, str]:
    """Return the prefix of a stored tensor's name in the file, and its parameter."""
    for common in _COMMON:
        if stored.startswith(common):
            return "", stored.removeprefix(common)
    if stored.startswith("stage."):
        _, stage, parameter = stored.split(".", 2)
        return f"{PREFIX}stage.{stage}.", parameter
    return PREFIX, stored


def _part(
    run: Run, name: str, stored: str, tensors: dict[str, torch.Tensor], dense_rows: int
) -> _Part:
    """Find a run of a dense parameter in what is left of the parameter.

    Raises:
        ValueError: rows were cut from a parameter that the file does not hold in one run.
    """
    rows = len(tensors[stored])
    if rows == dense_rows:
        return _Part(stored, run.start, run.rows)
    if run.rows != dense_rows:
        raise ValueError(
            f"single file: {run.parameter} must lie in one piece and in order in {name} to lose "
            "rows, but it does not. Save it as a folder with save_pretrained."
        )
    return _Part(stored, 0, rows)


def _dense_name(name: str) -> str:
    """Return the name in the source of a tensor that may be one stage's."""
    if name.startswith(f"{PREFIX}stage."):
        return name.removeprefix(f"{PREFIX}stage.").split(".", 1)[1]
    return name


def _written(parts: list[_Part], tensors: dict[str, torch.Tensor]) -> Any:
    """Write parts for JSON; one whole tensor as its name."""
    if len(parts) == 1 and parts[0].rows == len(tensors[parts[0].stored]):
        return parts[0].stored
    return [[part.stored, part.start, part.rows] for part in parts]


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
