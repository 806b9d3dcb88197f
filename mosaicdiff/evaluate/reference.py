"""Real pictures that features are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import digits
from ..inputs.images import check_images, read_image
from .frechet import Moments, moments
from .networks import FeatureNetwork, extract, join

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
_BATCH = 64


@dataclass(frozen=True)
class Reference:
    """Features of real pictures.

    Args:
        name: where they came from.
        moments: mean and covariance.
        features: (N, d) float32, or None where only the moments are known.
    """

    name: str
    moments: Moments
    features: torch.Tensor | None

    @property
    def count(self) -> int | None:
        """How many pictures; None where only the moments are known."""
        return None if self.features is None else len(self.features)


def check_reference(source: str | None, network: FeatureNetwork) -> None:
    """Refuse a reference that is not there or cannot be read, before anything is sampled.

    Args:
        source: see `load_reference`.
        network: whose features it is for.

    Raises:
        ValueError: says what is wrong.
    """
    if source is None:
        if network.name != "digits":
            raise ValueError(
                f"--reference must be given with --features {network.name}, got none. Give a "
                "folder of real pictures, or a .npz file of their statistics."
            )
        return
    path = Path(source)
    if path.is_dir():
        pictures = _pictures(path)
        if len(pictures) < 2:
            raise ValueError(
                f"--reference must be a folder of at least 2 pictures, got {len(pictures)} in "
                f"{path}."
            )
        try:
            check_images(pictures)
        except ValueError as error:
            raise ValueError(f"--reference: {str(error).partition(': ')[2]}") from None
    elif path.is_file() and path.suffix.lower() == ".npz":
        _read_npz(path, network)
    else:
        raise ValueError(
            f"--reference must be a folder of pictures or a .npz file of statistics, got {source}."
        )


def load_reference(
    source: str | None, network: FeatureNetwork, shape: tuple[int, int, int]
) -> Reference:
    """Return the features of real pictures.

    Args:
        source: a folder of pictures, searched with its sub-folders, scaled and cropped to the
            size of those sampled; a `.npz` file with `mu` and `sigma`, of `features` (as
            `save_reference` writes them), or with pictures `arr_0` (N, H, W, C) of uint8, or with
            both; None is the data set of the digits.
        network: whose features.
        shape: of a picture sampled, (C, H, W).

    Raises:
        ValueError: it cannot be read, or does not fit the network.
    """
    check_reference(source, network)
    if source is None:
        values = extract(network, digits.load_images()[0], 256).values
        return Reference("digits", moments(values.numpy()), values)
    path = Path(source)
    if path.is_dir():
        found = _pictures(path)
        parts = []
        for first in range(0, len(found), _BATCH):
            batch = [read_image(file, *shape) for file in found[first : first + _BATCH]]
            parts.append(network(torch.stack(batch)))
        values = join(parts).values
        return Reference(str(path), moments(values.numpy()), values)
    held = _read_npz(path, network)
    sample = _values(held, network)
    if sample is None or "mu" in held:  # of the whole set, where the pictures are a sample of it
        known = Moments(np.asarray(held["mu"], np.float64), np.asarray(held["sigma"], np.float64))
    else:
        known = moments(sample.numpy())
    return Reference(str(path), known, sample)


def _values(held: dict[str, Any], network: FeatureNetwork) -> torch.Tensor | None:
    """Return the features of a file, or those of its pictures, if it has any."""
    if "features" in held:
        return torch.from_numpy(np.asarray(held["features"], np.float32))
    if "arr_0" not in held:
        return None
    pixels = torch.from_numpy(held["arr_0"]).permute(0, 3, 1, 2)
    return join([network(part.float() / 127.5 - 1) for part in pixels.split(_BATCH)]).values


def save_reference(path: Path, reference: Reference, network: FeatureNetwork) -> None:
    """Write the features of a reference, so that its pictures need not be read again.

    Raises:
        ValueError: the file is no `.npz`, or only the moments are known.
    """
    if path.suffix.lower() != ".npz":
        raise ValueError(f"--save-reference must end in .npz, got {path}.")
    if reference.features is None:
        raise ValueError(
            f"--save-reference must be left out with {reference.name}, which holds statistics only."
        )
    partial = path.with_name(path.name + ".partial.npz")
    np.savez(partial, features=reference.features.numpy(), network=np.asarray(network.name))
    partial.replace(path)


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES)


def _read_npz(path: Path, network: FeatureNetwork) -> dict[str, Any]:
    """Read the arrays that are known, and hold them to their shapes."""
    names = ("mu", "sigma", "features", "arr_0", "network")
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in names if name in file.files}
            others = ", ".join(file.files)
    except (OSError, ValueError) as error:
        raise ValueError(f"--reference: {path} could not be read: {error}") from None
    if not ({"mu", "sigma"} <= set(held) or {"features", "arr_0"} & set(held)):
        raise ValueError(
            f"--reference must hold mu and sigma, or features, or pictures arr_0, got {others} in "
            f"{path}."
        )
    made_by = str(held.pop("network", network.name))
    if made_by != network.name:
        raise ValueError(
            f"--reference must hold features of {network.name}, got those of {made_by} in {path}."
        )
    if "mu" in held and (held["mu"].ndim != 1 or held["sigma"].shape != held["mu"].shape * 2):
        raise ValueError(
            f"--reference must hold mu (d,) and sigma (d, d), got {held['mu'].shape} and "
            f"{held['sigma'].shape} in {path}."
        )
    if "arr_0" in held and (held["arr_0"].ndim != 4 or held["arr_0"].dtype != np.uint8):
        raise ValueError(
            f"--reference must hold pictures arr_0 (N, H, W, C) of uint8, got "
            f"{held['arr_0'].shape} of {held['arr_0'].dtype} in {path}."
        )
    return held
