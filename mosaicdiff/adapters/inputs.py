"""What a denoiser is conditioned on, as data: names, shapes, and where a call holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..groups import Denoiser, leading_parameter

#: Before the name of the null condition of an input.
NEGATIVE = "negative_"


@dataclass(frozen=True)
class Condition:
    """One input of a denoiser beside latents and timestep.

    Args:
        argument: of the forward; dotted where it lies in a dict (`added_cond_kwargs.text_embeds`).
        shape: of one sample: numbers, names of the denoiser's configuration (`a|b` is b where a
            is None), or streams of tokens (`text`), whose length is free but the same for all
            conditions that name it.
        label: what a calibration file calls it; the last part of the argument by default.
        optional: whether a batch may be without.
        when: name of a switch of the configuration: a denoiser in which it is off takes no notice
            of this input, and a batch may be without.
        null: whether a null condition differs in it.
        per_call: whether a call takes one value for all rows (positions, numbers of frames); a
            batch still holds a row for each sample.
        number: of a plain number that a call takes where it is `per_call` and has no shape:
            int or float; None of a tensor.
        whole_numbers: whether its values are whole numbers.
        example: that stands for its values where only shapes matter.
    """

    argument: str
    shape: tuple[int | str, ...] = ()
    label: str = ""
    optional: bool = False
    when: str = ""
    null: bool = True
    per_call: bool = False
    number: type | None = None
    whole_numbers: bool = False
    example: float = 0.0

    @property
    def name(self) -> str:
        """Name in a batch: the argument, its last part where it lies in a dict."""
        return self.argument.rpartition(".")[2]

    @property
    def file_name(self) -> str:
        """Name in a calibration file."""
        return self.label or self.name

    @property
    def negative(self) -> str:
        """Name of the null condition in a batch."""
        return NEGATIVE + self.name

    def taken(self, denoiser: Denoiser) -> bool:
        """Return whether a denoiser takes notice of it."""
        return not self.when or bool(getattr(denoiser.config, self.when))

    def needed(self, denoiser: Denoiser) -> bool:
        """Return whether a batch for a denoiser must hold it."""
        return not self.optional and self.taken(denoiser)

    def find(self, arguments: Mapping[str, Any]) -> Any:
        """Return its value in the arguments of a call, or None."""
        value: Any = arguments
        for part in self.argument.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def put(self, arguments: dict[str, Any], value: torch.Tensor | float) -> None:
        """Put a batch's value, or a plain number, into the arguments of a call."""
        *path, leaf = self.argument.split(".")
        for part in path:
            arguments = arguments.setdefault(part, {})
        if self.per_call and torch.is_tensor(value):
            arguments[leaf] = value[0] if self.number is None else self.number(value[0].item())
        else:
            arguments[leaf] = value

    def rows(self, value: Any, count: int) -> torch.Tensor:
        """Return a value of a call with a row for each of its samples."""
        tensor = value if torch.is_tensor(value) else torch.tensor(value)
        if self.per_call:
            tensor = tensor.unsqueeze(0).expand(count, *tensor.shape)
        if self.whole_numbers and tensor.is_floating_point():  # a mask may be in the latents' type
            tensor = tensor.long()
        return tensor.detach().cpu()


def check_conditions(
    denoiser: Denoiser,
    conditions: Sequence[Condition],
    rows: int,
    inputs: Mapping[str, Any],
    family: str,
) -> None:
    """Refuse a batch whose conditions are not all there, or of wrong shape or kind.

    Raises:
        ValueError: names the input.
    """
    known = {c.name: c for c in conditions} | {c.negative: c for c in conditions if c.null}
    needed = [c.name for c in conditions if c.needed(denoiser)]
    missing, unknown = set(needed) - set(inputs), set(inputs) - set(known)
    nulls = [c for c in conditions if c.null and c.name in inputs]
    given = [c for c in nulls if c.negative in inputs]
    if missing or unknown or (given and len(given) < len(nulls)):
        null = " and ".join(c.negative for c in nulls if c.needed(denoiser))
        can = f" and, where there is a null condition, {null}" if null else ""
        raise ValueError(
            f"calibration: inputs of a batch for {family} must be {' and '.join(needed)}{can}, "
            f"got {sorted(inputs)}."
        )
    free: dict[str, int] = {}
    for name in sorted(inputs, key=lambda n: n.startswith(NEGATIVE)):
        condition, value = known[name], inputs[name]
        expected = (rows, *(_size(denoiser, part, free) for part in condition.shape))
        shape = tuple(value.shape)
        fits = len(shape) == len(expected) and all(
            want is None or want == got for want, got in zip(expected, shape, strict=True)
        )
        if not fits:
            names = [
                f"{part} tokens" if want is None else str(want)
                for part, want in zip((rows, *condition.shape), expected, strict=True)
            ]
            raise ValueError(f"calibration: {name} must be ({', '.join(names)}), got {shape}.")
        for part, got in zip(condition.shape, shape[1:], strict=True):
            if isinstance(part, str) and _configured(denoiser, part) is None:
                free.setdefault(part, got)
        if condition.whole_numbers == value.is_floating_point() and value.dtype != torch.bool:
            kind = "whole" if condition.whole_numbers else "floating-point"
            raise ValueError(f"calibration: {name} must be {kind} numbers, got {value.dtype}.")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(
                f"calibration: {name} must be finite floating-point numbers, got NaN or infinity."
            )
        if condition.per_call and not bool((value == value[:1]).all()):
            raise ValueError(
                f"calibration: {name} must be the same for all samples of a batch, got several: a "
                "call takes one for all its rows. Give samples that differ in it in batches of "
                "their own."
            )


def _size(denoiser: Denoiser, part: int | str, free: Mapping[str, int]) -> int | None:
    """Return what a part of a shape must be; None where anything goes."""
    if isinstance(part, int):
        return part
    configured = _configured(denoiser, part)
    return free.get(part) if configured is None else configured


def _configured(denoiser: Denoiser, part: str) -> int | None:
    """Return what the configuration says of a part of a shape; None where it says nothing."""
    values = (getattr(denoiser.config, name, None) for name in part.split("|"))
    return next((value for value in values if value is not None), None)


def with_null(
    conditions: Sequence[Condition], inputs: Mapping[str, Any], rows: torch.Tensor
) -> dict[str, Any]:
    """Return the conditions of a batch, null where `rows` is true; see `Adapter.null_inputs`."""
    found = {c.name: inputs[c.name] for c in conditions if c.name in inputs}
    if not rows.any():
        return found
    changing = [c for c in conditions if c.null and c.name in found]
    if not all(c.negative in inputs for c in changing):
        raise ValueError(
            "calibration: null_share must be 0 where the batches do not hold the null condition. "
            f"Give them {' and '.join(c.negative for c in changing)}, the encodings of the empty "
            "prompt, or set null_share=0."
        )
    for condition in changing:
        value = found[condition.name]
        chosen = rows.to(value.device).reshape(-1, *[1] * (value.ndim - 1))
        found[condition.name] = torch.where(chosen, inputs[condition.negative], value)
    return found


def example_conditions(
    denoiser: Denoiser,
    conditions: Sequence[Condition],
    tokens: Mapping[str, int],
    rows: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Make conditions of the right shapes and types, without the optional ones."""
    dtype, found = leading_parameter(denoiser).dtype, {}
    for condition in conditions:
        if not condition.needed(denoiser):
            continue
        sizes = [_size(denoiser, part, tokens) for part in condition.shape]
        kind = torch.long if condition.whole_numbers else dtype
        found[condition.name] = torch.full(
            (rows, *(size or 0 for size in sizes)), condition.example, dtype=kind, device=device
        )
    return found
