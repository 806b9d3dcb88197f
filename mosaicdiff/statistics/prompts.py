"""What a pipeline is given to sample along: prompts, or labels of a class-conditional one."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..inputs.prompt_files import PromptFile, Row, read_prompt_file
from ..trajectory_config import TrajectoryConfig

#: Texts, or labels (numbers or names), or a file of them (see `read_prompt_file`).
PromptSource = str | Path | PromptFile | Sequence[str | int] | None

#: Arguments of a pipeline's call that take a batch of conditions, and guidance.
_CONDITIONS = ("class_labels", "prompt")
_GUIDANCE = ("guidance_scale", "true_cfg_scale", "cfg_scale")


@dataclass(frozen=True)
class Prompts:
    """Conditions to sample with, checked.

    Args:
        argument: of the pipeline's call that takes them.
        values: texts, or label numbers.
    """

    argument: str
    values: tuple[str, ...] | tuple[int, ...]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def digest(self) -> str:
        """A name for the values and their order."""
        return hashlib.blake2b(json.dumps(self.values).encode(), digest_size=16).hexdigest()

    def batches(self, samples: int, size: int) -> Iterator[list[Any]]:
        """Yield so many values, in batches; they are used in turn."""
        for start in range(0, samples, size):
            last = min(start + size, samples)
            yield [self.values[i % len(self.values)] for i in range(start, last)]


def condition_argument(call: Callable[..., Any]) -> str:
    """Return the argument by which a pipeline's call takes its conditions.

    Raises:
        ValueError: it has none that is known.
    """
    name = find_condition(call)
    if name is None:
        parameters = inspect.signature(call).parameters
        raise ValueError(
            f"prune: model must be a pipeline that takes {' or '.join(_CONDITIONS)} with "
            f"activations='trajectory', got one that takes {', '.join(parameters)}. "
            "Use activations='noised' with clean latents."
        )
    return name


def find_condition(call: Callable[..., Any]) -> str | None:
    """Return the argument by which a pipeline's call takes its conditions, if one is known."""
    parameters = inspect.signature(call).parameters
    return next((name for name in _CONDITIONS if name in parameters), None)


def call_options(call: Callable[..., Any], config: TrajectoryConfig) -> dict[str, Any]:
    """Return what a pipeline's call is given beside prompts, steps and a generator.

    Raises:
        ValueError: the call has no such argument, or it is one that is set already.
    """
    parameters = inspect.signature(call).parameters
    options = dict(config.options)
    ours = {"num_inference_steps", "generator", "output_type", "return_dict", "latents"}
    for name in options:
        if name in ours.union(_CONDITIONS) or name not in parameters:
            free = sorted(set(parameters) - ours.union(_CONDITIONS, {"self"}))
            raise ValueError(
                f"TrajectoryConfig: options must be among {', '.join(free)} for this pipeline, "
                f"got {name!r}. Steps, seed and prompts have fields of their own."
            )
    if config.guidance_scale is not None:
        found = [name for name in _GUIDANCE if name in parameters]
        if not found:
            raise ValueError(
                "TrajectoryConfig: guidance_scale must be left out for this pipeline, which has "
                f"no guidance, got {config.guidance_scale}."
            )
        if found[0] in options:
            raise ValueError(
                f"TrajectoryConfig: options must not hold {found[0]} beside guidance_scale="
                f"{config.guidance_scale}, got {options[found[0]]!r}. Give it once."
            )
        options[found[0]] = config.guidance_scale
    if "output_type" in parameters:  # no decoding, where the pipeline can do without
        options["output_type"] = "latent"
    return options


def read_prompts(
    source: PromptSource,
    argument: str,
    *,
    classes: int = 0,
    names: Mapping[str, int] | None = None,
    samples: int = 1,
    seed: int = 0,
) -> Prompts:
    """Read what to sample with.

    Args:
        source: texts or labels; a file of them (see `inputs.prompt_files.read_prompt_file`); or
            None for labels: all classes in an order drawn by the seed, in turn.
        argument: see `condition_argument`.
        classes: how many a class-conditional pipeline has.
        names: of its classes.
        samples: how many are wanted.
        seed: of the order.

    Raises:
        ValueError: there is nothing, or something the pipeline does not take; says what.
    """
    by_class = argument == "class_labels"
    if source is None:
        if not by_class:
            raise ValueError(
                "prune: prompts must be given with activations='trajectory', got None. Give a "
                "list of texts, or a file of prompts (--prompts FILE)."
            )
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
        return Prompts(argument, tuple(order[:samples].tolist()))
    if isinstance(source, (str, Path)):
        source = PromptFile(Path(source))
    if isinstance(source, PromptFile):
        rows: list[Row] = read_prompt_file(source.path, source.column)
    else:
        rows = [(f"entry {index}", value) for index, value in enumerate(source)]
    if not rows:
        raise ValueError("prune: prompts must hold at least one, got an empty list.")
    if by_class:
        known = names or {}
        return Prompts(argument, tuple(_label(place, v, classes, known) for place, v in rows))
    for place, value in rows:
        if not isinstance(value, str):
            raise ValueError(
                f"prune: prompts must be texts for this pipeline, got {value!r} ({place})."
            )
    return Prompts(argument, tuple(value for _, value in rows))


def _label(place: str, value: Any, classes: int, names: Mapping[str, int]) -> int:
    number = value
    if isinstance(value, str):
        number = names[value] if value in names else int(value) if value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int):
        known = ", or names of classes" if names else ""
        raise ValueError(
            f"prune: prompts must be labels 0..{classes - 1}{known} for this class-conditional "
            f"pipeline, got {value!r} ({place})."
        )
    if not 0 <= number < classes:
        raise ValueError(
            f"prune: prompts must be labels in 0..{classes - 1}, got {number} ({place})."
        )
    return number
