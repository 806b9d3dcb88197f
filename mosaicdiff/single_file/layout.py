"""Which rows of which tensor of a single file each parameter of a diffusers model is made of.

diffusers has a function for each family that turns the published layout into its own. All of them
rename tensors, split or join them along their rows, and permute rows; nothing else. So the way
back needs no second table: the function is given tensors that hold their rows' numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: Names and shapes of tensors.
Shapes = Mapping[str, tuple[int, ...]]

#: What the second column of a stand-in holds more than the first; no file has so many rows.
_COLUMN = 2**48


@dataclass(frozen=True)
class Run:
    """Rows of a parameter, ascending and adjoining, that adjoin in a tensor of the file too.

    Args:
        parameter: name in the diffusers model.
        start: first row in the parameter.
        rows: how many.
    """

    parameter: str
    start: int
    rows: int


#: For each tensor of a file that the denoiser is made of, what its rows are, from the first on.
Layout = dict[str, tuple[Run, ...]]


def conversion_of(class_name: str) -> Callable[..., dict[str, Any]]:
    """Return diffusers' function that converts a file's tensors for a denoiser class.

    Raises:
        ValueError: diffusers reads no single files of the class.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if class_name not in SINGLE_FILE_LOADABLE_CLASSES:
        raise ValueError(
            f"single file: denoiser must be of a class that diffusers reads from single files, "
            f"got {class_name}. Convert it into a diffusers folder and prune that."
        )
    return SINGLE_FILE_LOADABLE_CLASSES[class_name]["checkpoint_mapping_fn"]


def derive_layout(
    convert: Callable[..., dict[str, Any]],
    config: dict[str, Any],
    parameters: Shapes,
    source: Shapes,
) -> Layout:
    """Find what each tensor of a file is made of, by converting tensors of row numbers.

    Takes two int64 for each row of the file.

    Args:
        convert: diffusers' conversion for the class, `conversion_of`.
        config: of the dense model.
        parameters: of the dense model, buffers that are saved among them.
        source: of the file.

    Returns:
        Tensors of the file that no parameter is made of (VAE, text encoders) are not in it.

    Raises:
        ValueError: the file is of another model, or the conversion does more than move rows.
    """
    numbers, first, total = {}, {}, 0
    for name, shape in source.items():
        numbers[name], first[name] = _row_numbers(shape, total), total
        total += shape[0] if shape else 1
    if set(parameters) == set(source):
        converted = numbers  # in diffusers' own layout: diffusers converts nothing then
    else:
        try:
            converted = convert(config=config, checkpoint=dict(numbers))
        except (KeyError, IndexError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"single file: source must be the file of this model, but diffusers cannot "
                f"convert it: {type(error).__name__}: {error}."
            ) from None
    owner = torch.full((total,), -1)
    place = torch.zeros(total, dtype=torch.long)
    names = list(parameters)
    starts = torch.tensor(list(first.values()))
    sources = list(source)
    for index, name in enumerate(names):
        rows = _rows_of(name, converted.get(name), parameters[name])
        if len(rows) != (parameters[name][0] if parameters[name] else 1):
            raise _of_another_model(name, parameters[name], (len(rows),))
        for one in torch.searchsorted(starts, rows, right=True).sub(1).unique().tolist():
            if tuple(source[sources[one]][1:]) != tuple(parameters[name][1:]):
                raise _of_another_model(name, parameters[name], source[sources[one]])
        if (owner[rows] >= 0).any():
            other = names[int(owner[rows].max())]
            raise ValueError(
                f"single file: rows of the file must belong to one parameter, but {name} and "
                f"{other} are made of the same. Convert the file into a diffusers folder and "
                "prune that."
            )
        owner[rows], place[rows] = index, torch.arange(len(rows))
    layout = {}
    for name, shape in source.items():
        part = slice(first[name], first[name] + (shape[0] if shape else 1))
        claimed = owner[part] >= 0
        if claimed.any():
            if not claimed.all():
                raise ValueError(
                    f"single file: {name} must be used whole, but {int((~claimed).sum())} of its "
                    "rows are in no parameter. Convert the file into a diffusers folder and prune "
                    "that."
                )
            layout[name] = _runs(owner[part], place[part], names)
    return layout


def _row_numbers(shape: tuple[int, ...], first: int) -> torch.Tensor:
    """Make a stand-in for a tensor: its row numbers, in two columns where it has as many."""
    if not shape:
        return torch.tensor(first)
    rows = torch.arange(first, first + shape[0])
    if len(shape) == 1:
        return rows
    columns = torch.arange(min(shape[1], 2)) * _COLUMN
    return (rows[:, None] + columns).reshape(shape[0], len(columns), *[1] * (len(shape) - 2))


def _rows_of(name: str, converted: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Read the row numbers of a converted stand-in for a parameter of some shape, (rows,).

    Raises:
        ValueError: it is missing, or something else than rows was moved.
    """
    if not isinstance(converted, torch.Tensor):
        raise ValueError(
            f"single file: source must hold {name}, but diffusers finds none there. Name the file "
            "that the model was loaded from; a model that diffusers' from_single_file cannot read "
            "is pruned as a folder."
        )
    rows = converted.reshape(len(converted) if converted.ndim else 1, -1)
    numbers = rows[:, 0].contiguous()
    columns = torch.arange(rows.shape[1]) * _COLUMN
    plain = not rows.is_floating_point() and converted.ndim == len(shape)
    plain &= rows.shape[1] == (min(shape[1], 2) if len(shape) > 1 else 1)
    if not plain or (numbers >= _COLUMN).any() or (rows != numbers[:, None] + columns).any():
        raise ValueError(
            f"single file: diffusers' conversion must only move rows, but {name} is made in "
            "another way. Convert the file into a diffusers folder and prune that."
        )
    return numbers


def _runs(owner: torch.Tensor, place: torch.Tensor, names: list[str]) -> tuple[Run, ...]:
    breaks = (owner[1:] != owner[:-1]) | (place[1:] != place[:-1] + 1)
    edges = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(owner)]
    return tuple(
        Run(names[int(owner[start])], int(place[start]), stop - start)
        for start, stop in zip(edges, edges[1:], strict=False)
    )


def _of_another_model(name: str, shape: tuple[int, ...], got: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"single file: source must be the file that the model was loaded from, but {name} of "
        f"{tuple(shape)} is {tuple(got)} there."
    )
