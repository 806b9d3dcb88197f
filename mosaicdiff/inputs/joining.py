"""Conditions of several calls as rows of one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..adapters.inputs import Condition

#: Conditions of the calls of one batch of texts: their own, and the null ones (or none).
Part = tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]


def joined(parts: Sequence[Part], conditions: Sequence[Condition]) -> dict[str, torch.Tensor]:
    """Put the conditions of several batches of texts under each other, with the null ones beside.

    Some pipelines pad texts to the longest of a batch, and give no mask where nothing is padded:
    shorter ones are padded on with zeros, and masked.

    Returns:
        Rows by name. A null condition that is the same in all rows has one row.

    Raises:
        ValueError: texts are of several lengths and the denoiser takes no mask, or batches do not
            hold the same conditions.
    """
    filled = [_filled(part, parts, conditions) for part in parts]
    found: dict[str, torch.Tensor] = {}
    for condition in conditions:
        name = condition.name
        if not any(name in own for own, _ in filled):
            continue
        lengths = _longest([call[name] for part in filled for call in part if name in call])
        found[name] = torch.cat([_padded(own[name], lengths) for own, _ in filled])
        if condition.null and all(name in null for _, null in filled):
            value = torch.cat([_padded(null[name], lengths) for _, null in filled])
            found[condition.negative] = value[:1] if _alike(value) else value
    return found


def _alike(value: torch.Tensor) -> bool:
    """Tell whether all rows are the first one, but for rounding, which may differ by row."""
    if not value.is_floating_point():
        return bool((value == value[:1]).all())
    rounding = 16 * torch.finfo(value.dtype).eps * float(value[:1].abs().max())
    return all(float((row - value[0]).abs().max()) <= rounding for row in value)


def _filled(part: Part, parts: Sequence[Part], conditions: Sequence[Condition]) -> Part:
    """Give the calls of a batch the masks that they lack where others have one, or need one."""
    calls = [call for both in parts for call in both if call]
    made: list[dict[str, torch.Tensor]] = [dict(call) for call in part]
    for stream in {p for c in conditions for p in c.shape if isinstance(p, str)}:
        lengths = {_length(call, stream, conditions) for call in calls} - {None}
        mask = next((c for c in conditions if c.shape == (stream,) and "mask" in c.name), None)
        if mask is None:
            if len(lengths) > 1:
                raise ValueError(
                    f"calibration: texts must be encoded to the same number of tokens, got "
                    f"{', '.join(map(str, sorted(n for n in lengths if n)))}: the denoiser takes "
                    "no mask. Name a length (--pipeline-option max_sequence_length=...)."
                )
            continue
        if len(lengths) < 2 and not any(mask.name in call for call in calls):
            continue
        like = next((call[mask.name] for call in calls if mask.name in call), None)
        kind = torch.long if like is None else like.dtype
        for call in made:
            length = _length(call, stream, conditions)
            if call and length is not None and mask.name not in call:
                rows = len(next(iter(call.values())))
                call[mask.name] = torch.ones(rows, length, dtype=kind)
    for condition in conditions:
        name = condition.name
        if name not in made[0] and any(name in call for call in calls):
            raise ValueError(
                f"calibration: {name} must be given for all texts or for none, but the pipeline "
                "gives it for some."
            )
    return made[0], made[1]


def _length(
    call: Mapping[str, torch.Tensor], stream: str, conditions: Sequence[Condition]
) -> int | None:
    """Return the tokens of a stream in a call; None where it has none."""
    for condition in conditions:
        value = call.get(condition.name)
        if value is not None and stream in condition.shape:
            return int(value.shape[1 + condition.shape.index(stream)])
    return None


def _longest(values: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return tuple(max(sizes) for sizes in zip(*(v.shape[1:] for v in values), strict=True))


def _padded(value: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    if tuple(value.shape[1:]) == lengths:
        return value
    longer = value.new_zeros(len(value), *lengths)
    longer[tuple(slice(0, size) for size in value.shape)] = value
    return longer
