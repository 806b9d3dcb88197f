"""What an evaluation needs to go on after it was killed, in one `.npz` file."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from .cost import Calls
from .networks import Features
from .quality import Tally

_FORMAT = 1
#: Values of each parameter that a model is recognised by.
_SAMPLED = 64


class Run(Protocol):
    """What is kept of one model at one guidance scale; see `compare`."""

    tally: Tally
    calls: list[Calls]
    seconds: list[float]
    kept: list[torch.Tensor]


def fingerprint(denoisers: Iterable[nn.Module]) -> str:
    """Return a name of models' weights, by the first values of every parameter."""
    digest = hashlib.blake2b(digest_size=16)
    for denoiser in denoisers:
        for name, parameter in denoiser.named_parameters():
            some = parameter.detach().flatten()[:_SAMPLED].float().cpu().numpy()
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.tobytes())
    return digest.hexdigest()


def check_state_file(path: Path) -> None:
    """Refuse a file that a state could not be written to.

    Raises:
        ValueError: its ending is another, or its folder is missing.
    """
    if path.suffix.lower() != ".npz" or not path.absolute().parent.is_dir():
        raise ValueError(
            f"compare: state must be a .npz in a folder that exists, got {path}. It is written "
            "after every batch."
        )


def save_state(path: Path, identity: Mapping[str, Any], done: int, runs: Sequence[Run]) -> None:
    """Write all that was found so far, whole or not at all.

    Args:
        path: file to replace.
        identity: what decides the result, as JSON holds it.
        done: pictures of each run that are judged.
        runs: in the order of the rows.
    """
    arrays: dict[str, np.ndarray] = {}
    records = []
    for number, run in enumerate(runs):
        features = run.tally.features
        if features is not None:
            arrays[f"{number}.features"] = features.values.numpy()
            if features.probabilities is not None:
                arrays[f"{number}.probabilities"] = features.probabilities.numpy()
        arrays[f"{number}.images"] = torch.cat(run.kept).numpy()
        samples = [calls.samples for calls in run.calls]
        records.append({**run.tally.record(), "seconds": run.seconds, "samples": samples})
    content = {"format": _FORMAT, **identity, "done": done, "runs": records}
    arrays["record"] = np.asarray(json.dumps(content))
    partial = path.with_name(path.name + ".partial.npz")
    np.savez(partial, **arrays)  # type: ignore[arg-type]
    partial.replace(path)


def load_state(path: Path, identity: Mapping[str, Any], runs: Sequence[Run]) -> int:
    """Put what was found before into runs that have just begun, and return how far they are.

    Args:
        path: file to read; one that is not there is a beginning.
        identity: as given to `save_state`.
        runs: in the order of the rows.

    Raises:
        ValueError: it is no state, or one of another evaluation.
    """
    if not path.exists():
        return 0
    cure = "Delete it, or choose another file."
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        found = json.loads(str(arrays["record"]))
        other = [k for k, v in {"format": _FORMAT, **identity}.items() if found.get(k) != v]
        if other:
            raise _Another(
                f"compare: state must be of the same evaluation, got {path}, of other "
                f"{' and '.join(other)}. {cure}"
            )
        for number, (run, record) in enumerate(zip(runs, found["runs"], strict=True)):
            features = None
            if f"{number}.features" in arrays:
                held = arrays.get(f"{number}.probabilities")
                features = Features(
                    torch.from_numpy(arrays[f"{number}.features"]),
                    None if held is None else torch.from_numpy(held),
                )
            run.tally.restore(record, features)
            run.kept[:] = [torch.from_numpy(arrays[f"{number}.images"])]
            run.seconds[:] = record["seconds"]
            for calls, samples in zip(run.calls, record["samples"], strict=True):
                calls.samples = samples
        return int(found["done"])
    except _Another:
        raise
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"compare: state must be a file that evaluate wrote, got {path} ({error!r}). {cure}"
        ) from error


class _Another(ValueError):
    """A state that can be read, of another evaluation."""
