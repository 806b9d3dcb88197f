"""Run 2:4 pruned linears on a GPU's sparse tensor cores, and measure whether that helps."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .evaluate.latency import time_networks
from .groups import leading_parameter
from .pack import StageBuilder, make_linear
from .runtime import StagedDenoiser

#: Compute capability from which there are sparse tensor cores.
CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SemiStructuredReport:
    """What was converted, and milliseconds of a call before and after, in turn on one device.

    Args:
        converted: names of linears, by stage.
        skipped: why a masked linear stayed dense, by stage and name.
        before: median milliseconds of a call of each stage with dense weights; None where
            nothing was measured.
        after: the same with the converted ones.
        gain: before over after, averaged over the sampling steps of the plan, the median of the
            rounds; below 1 it got slower.
    """

    converted: list[list[str]]
    skipped: list[dict[str, str]]
    before: list[float] | None = None
    after: list[float] | None = None
    gain: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)


def to_semi_structured(
    staged: StagedDenoiser, *, measure: bool = True, batch_size: int = 1, repeats: int = 10
) -> SemiStructuredReport:
    """Turn the 2:4 masked linears of every stage into torch's semi-structured sparse tensors.

    For running only: it can neither be saved nor trained afterwards. Whether it is faster
    depends on the shapes, the batch and the device; the report says what was measured.

    Args:
        staged: on a CUDA device of capability 8.0 or more, in float16 or bfloat16. Changed in
            place, when all linears are converted.
        measure: time a call before and after.
        batch_size: rows of that call.
        repeats: rounds, after one that is not counted.

    Raises:
        RuntimeError: there is no such device.
        ValueError: the dtype is another, or no linear is masked 2:4 or fits.
    """
    stages: list[Any] = list(staged.stage_models)
    parameter = leading_parameter(stages[0])
    check_device(parameter.device)
    if parameter.dtype not in DTYPES:
        raise ValueError(
            f"to_semi_structured: staged must be float16 or bfloat16, got {parameter.dtype}. "
            "Load it with torch_dtype=torch.bfloat16."
        )
    chosen, skipped = choose_linears(staged)
    if not any(chosen):
        named = next((f"{n}: {why}" for row in skipped for n, why in row.items()), "none is masked")
        raise ValueError(
            f"to_semi_structured: staged must have linears that fit, got none ({named}). "
            "Prune with granularity 2:4."
        )
    made: dict[int, nn.Module] = {}
    networks = []
    for stage, names in zip(stages, chosen, strict=True):
        builder = StageBuilder(stage)
        for name in names:
            linear: Any = stage.get_submodule(name)
            if id(linear) not in made:
                weight = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
                made[id(linear)] = _with_weight(linear, weight)
            builder.replace(name, made[id(linear)])
        networks.append(builder.root)
    report = SemiStructuredReport(chosen, skipped)
    if measure:
        report = _measured(staged, stages, networks, report, batch_size, repeats)
    staged.stage_models = nn.ModuleList(networks)
    return report


def choose_linears(staged: StagedDenoiser) -> tuple[list[list[str]], list[dict[str, str]]]:
    """Sort the masked linears of each stage into those that can be converted and reasons not to."""
    chosen: list[list[str]] = []
    skipped: list[dict[str, str]] = []
    for stage, masks in zip(staged.stage_models, staged.masks, strict=True):
        reasons = {n: _reason(mask, stage.get_submodule(n).weight) for n, mask in masks.items()}
        chosen.append([name for name, reason in reasons.items() if reason is None])
        skipped.append({name: reason for name, reason in reasons.items() if reason is not None})
    return chosen, skipped


def _reason(mask: torch.Tensor, weight: Any) -> str | None:
    """Say why a linear cannot be converted; None where it can."""
    m, n = mask.shape
    if type(weight.data) is not torch.Tensor:
        return "converted before"
    if n % 4 or bool((mask.reshape(m, -1, 4).sum(-1) > 2).any()):
        return "not masked 2:4"
    rows, columns = _least_shape(weight.dtype)
    if m % rows or n % columns:
        return f"{m} x {n} is no multiple of {rows} x {columns}"
    return None


def _least_shape(dtype: torch.dtype) -> tuple[int, int]:
    """Return what rows and columns must be multiples of, in the library that torch will use."""
    from torch.sparse import semi_structured

    forced = semi_structured.SparseSemiStructuredTensor._FORCE_CUTLASS
    used: Any = (
        semi_structured.SparseSemiStructuredTensorCUTLASS
        if forced
        else semi_structured.SparseSemiStructuredTensorCUSPARSELT
    )
    limits = used._DTYPE_SHAPE_CONSTRAINTS.get(dtype)
    return (1, 1) if limits is None else (limits.sparse_min_rows, limits.sparse_min_cols)


def check_device(device: torch.device) -> None:
    """Refuse a device that has no sparse tensor cores.

    Raises:
        RuntimeError: says what 2:4 weights are without.
    """
    needed = "{}.{}".format(*CAPABILITY)
    if device.type != "cuda":
        raise RuntimeError(
            f"to_semi_structured: device must be a CUDA device of capability {needed} or more, "
            f"got {device}. Without one, 2:4 weights take the same time as dense ones."
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise RuntimeError(
            f"to_semi_structured: device must have capability {needed} or more, got "
            f"{capability[0]}.{capability[1]}. It has no sparse tensor cores: 2:4 weights take "
            "the same time as dense ones."
        )


def _with_weight(linear: Any, weight: torch.Tensor) -> nn.Module:
    converted = make_linear(weight, linear.bias)
    converted.register_parameter("bias", linear.bias)
    return converted


def _measured(
    staged: StagedDenoiser,
    dense: list[Any],
    sparse: list[Any],
    report: SemiStructuredReport,
    batch_size: int,
    repeats: int,
) -> SemiStructuredReport:
    middles = [(stage.first + stage.last) // 2 for stage in staged.division.stages]
    pairs = [*zip(dense, middles, strict=True), *zip(sparse, middles, strict=True)]
    times = time_networks(staged.adapter, pairs, batch_size, repeats)
    count, steps = len(dense), staged.info.steps
    rounds = [
        sum(s * times[k][r] for k, s in enumerate(steps))
        / sum(s * times[count + k][r] for k, s in enumerate(steps))
        for r in range(repeats)
    ]
    middle = [statistics.median(row) for row in times]
    return SemiStructuredReport(
        report.converted,
        report.skipped,
        middle[:count],
        middle[count:],
        statistics.median(rounds),
    )
