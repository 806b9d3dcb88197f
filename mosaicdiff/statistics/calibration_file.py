"""Keep a calibration in one safetensors file, and refuse it for what it was not made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..config import PruneConfig
from ..files import current_umask
from ..groups import Denoiser, PrunableLayer, leading_parameter
from ..solving.curves import RemovalCurve
from ..trajectory.schedule import NoiseSchedule
from ..trajectory.stages import Division, Stage
from .calibration import Calibration, PackedStatistics, packed_bytes
from .prompts import Prompts

FORMAT_VERSION = 4
#: Settings that the statistics depend on, and those that the traced curves depend on too.
_MEASURED_WITH = ("samples", "seed", "null_share", "activations")
#: What a tensor takes in the header: place, shape, digest, and its name twice.
_ENTRY_BYTES = 110
TRACED_WITH = ("criterion", "compensation", "damping", "choice", "seed")


def made_for(
    denoiser: Denoiser, scheduler: Any, config: PruneConfig, prompts: Prompts | None = None
) -> dict[str, Any]:
    """Say what statistics depend on: the model, its schedule, and how they are drawn."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(denoiser.named_parameters()):
        digest.update(name.encode())
        raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    levels = schedule.signal.tobytes() + schedule.noise.tobytes()
    sampled: dict[str, Any] = {}
    if config.activations == "trajectory":
        sampled["trajectory"] = config.trajectory.to_dict(config.steps) | {"steps": config.steps}
        sampled["prompts"] = None if prompts is None else prompts.digest
    return {
        "model": digest.hexdigest(),
        "class": type(denoiser).__name__,
        "dtype": str(leading_parameter(denoiser).dtype).removeprefix("torch."),
        "schedule": hashlib.blake2b(levels, digest_size=16).hexdigest(),
        **{name: getattr(config, name) for name in _MEASURED_WITH},
        **sampled,
    }


def check_made_for(calibration: Calibration, wanted: Mapping[str, Any]) -> None:
    """Refuse a calibration of another model or schedule.

    Raises:
        ValueError: names what differs. How it was drawn may differ: it is what it is.
    """
    had = calibration.made_for
    names = {
        "class": "the denoiser's class",
        "dtype": "the type of the weights",
        "model": "the weights",
        "schedule": "the noise schedule",
    }
    for key, name in names.items():
        if had.get(key) != wanted[key]:
            raise ValueError(
                f"calibration: {name} must be those it was made for, got {wanted[key]} and not "
                f"{had.get(key)}. Calibrate this model (mosaicdiff calibrate), or load the one it "
                f"was made for, in its type (--dtype {had.get('dtype')})."
            )


def save_calibration(calibration: Calibration, path: str | Path) -> int:
    """Write a calibration; the file appears whole or not at all.

    Returns:
        Bytes written.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    for k, bin_ in enumerate(calibration.statistics):
        for reader, packed in bin_.items():
            tensors[f"hessian.{k}.{reader}"] = packed.hessian
            tensors[f"mean.{k}.{reader}"] = packed.mean
            tensors[f"weight.{k}.{reader}"] = torch.tensor(packed.weight, dtype=torch.float64)
    for k, traced in enumerate(calibration.curves or ()):
        for name, curve in traced.items():
            tensors[f"order.{k}.{name}"] = curve.order.to(torch.int32)
            tensors[f"losses.{k}.{name}"] = torch.from_numpy(curve.losses)
            tensors[f"damping.{k}.{name}"] = torch.tensor(curve.damping, dtype=torch.float64)
    description = {
        "format_version": FORMAT_VERSION,
        "stages": [asdict(stage) for stage in calibration.division.stages],
        "boundaries": list(calibration.division.boundaries),
        "steps": list(calibration.steps),
        # What is rounded to is the request's and the device's.
        "layers": [asdict(replace(layer, unit=1)) for layer in calibration.layers],
        "power": calibration.power,
        "weighted": calibration.weighted,
        "made_for": dict(calibration.made_for),
        "weights": dict(calibration.weights),
        "changes": calibration.changes,
        "traced_with": dict(calibration.traced_with),
        "digests": {name: _digest(tensor) for name, tensor in tensors.items()},
    }
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, partial, metadata={"mosaicdiff_calibration": json.dumps(description)})
        partial.chmod(0o666 & ~current_umask())  # safetensors makes it readable to its owner alone
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(raw.numpy().data, digest_size=8).hexdigest()


def _read(file: Any, path: Path, name: str, digests: Mapping[str, str]) -> torch.Tensor:
    """Read a tensor and hold it to its digest.

    Raises:
        ValueError: it is not what was written.
    """
    tensor = file.get_tensor(name)
    if _digest(tensor) != digests.get(name):
        raise ValueError(
            f"calibration: {name} in {path} must be as it was written, but its digest differs: "
            "the file is damaged. Calibrate again."
        )
    return tensor


def stated_bytes(layers: tuple[PrunableLayer, ...], bins: int, traced: bool = True) -> int:
    """Return about how large the file of so many bins will be, with or without curves."""
    total = packed_bytes(layers, bins)
    for layer in layers:
        total += sum(3 * bins * (_ENTRY_BYTES + 2 * len(name)) for name in layer.input_names)
        if traced:
            total += bins * (12 * layer.groups + 3 * (_ENTRY_BYTES + 2 * len(layer.name)))
    return total


def load_calibration_file(path: str | Path) -> Calibration:
    """Open what `save_calibration` wrote; the matrices are read when they are needed.

    Raises:
        ValueError: the file is missing, of another kind, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"calibration: {path} must be a file that `mosaicdiff calibrate` wrote, "
            f"but {'it is a folder' if path.is_dir() else 'there is none'}."
        )
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("mosaicdiff_calibration")
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"calibration: {path} could not be read: {error}. It must be a whole file that "
            "`mosaicdiff calibrate` wrote: calibrate again."
        ) from None
    if text is None:
        raise ValueError(
            f"calibration: {path} must be written by `mosaicdiff calibrate`, but it holds none. "
            "Clean latents are given as --calibration."
        )
    try:
        return _from_description(path, json.loads(text), names)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"calibration: {path} could not be read: {error!r} in its description. Calibrate again."
        ) from None


def _from_description(path: Path, values: dict[str, Any], names: set[str]) -> Calibration:
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"calibration: format_version must be {FORMAT_VERSION}, got {version} in {path}. "
            "Calibrate again with this mosaicdiff."
        )
    layers = tuple(
        PrunableLayer(**{**row, "writers": tuple(row["writers"]), "readers": tuple(row["readers"])})
        for row in values["layers"]
    )
    count = len(values["stages"])
    traced = bool(values["traced_with"])
    return Calibration(
        division=Division(
            tuple(Stage(**stage) for stage in values["stages"]), tuple(values["boundaries"])
        ),
        steps=tuple(values["steps"]),
        layers=layers,
        power=values["power"],
        weighted=values["weighted"],
        statistics=[_FileBin(path, k, layers, names, values["digests"]) for k in range(count)],
        made_for=values["made_for"],
        weights=values["weights"],
        changes=values["changes"],
        curves=[_read_curves(path, k, layers, values["digests"]) for k in range(count)]
        if traced
        else None,
        traced_with=values["traced_with"],
    )


def _read_curves(
    path: Path, index: int, layers: tuple[PrunableLayer, ...], digests: Mapping[str, str]
) -> dict[str, RemovalCurve]:
    curves = {}
    with safe_open(path, framework="pt") as file:
        for layer in layers:
            order, losses, damping = (
                _read(file, path, f"{part}.{index}.{layer.name}", digests)
                for part in ("order", "losses", "damping")
            )
            curves[layer.name] = RemovalCurve(order.long(), losses.numpy(), tuple(damping.tolist()))
    return curves


class _FileBin(Mapping[str, PackedStatistics]):
    """The statistics of one bin, read from the file when asked for."""

    def __init__(
        self,
        path: Path,
        index: int,
        layers: tuple[PrunableLayer, ...],
        names: set[str],
        digests: Mapping[str, str],
    ) -> None:
        self._path, self._index, self._digests = path, index, digests
        self._readers = [name for layer in layers for name in layer.input_names]
        for reader in self._readers:
            if f"hessian.{index}.{reader}" not in names:
                raise ValueError(
                    f"calibration: {path} must hold the statistics of {reader}, but does not. "
                    "Calibrate again."
                )

    def __getitem__(self, reader: str) -> PackedStatistics:
        with safe_open(self._path, framework="pt") as file:
            hessian, mean, weight = (
                _read(file, self._path, f"{part}.{self._index}.{reader}", self._digests)
                for part in ("hessian", "mean", "weight")
            )
        return PackedStatistics(hessian, mean, float(weight))

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)
