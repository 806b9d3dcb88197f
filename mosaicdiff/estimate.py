"""Memory and time of a plan, before it is carried out."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from .adapters import Adapter
from .config import PruneConfig
from .groups import Denoiser, PrunableLayer, input_widths, leading_parameter
from .statistics.bank import HessianBank
from .statistics.calibration import packed_bytes

#: Elimination does little of its work as large products: seen at a quarter of the matmul rate.
_ELIMINATION_SHARE = 0.25


def estimate_cost(
    denoiser: Denoiser,
    adapter: Adapter,
    layers: Sequence[PrunableLayer],
    stages: int,
    config: PruneConfig,
) -> dict[str, float]:
    """Estimate what calibrating and pruning so many stages (or bins) takes.

    Returns:
        `hessian_bytes` (of one stage, while it is calibrated; of all stages along a trajectory),
        `statistics_bytes` (of all stages, in main memory), `elimination_bytes` (a batch of the
        widest layers at once), `rate` (operations a second of a matrix product here and now) and
        `seconds`.
    """
    parameter = leading_parameter(denoiser)
    rate = measure_rate(parameter.device, parameter.dtype)
    samples, sums = stages * config.samples, 1
    if config.activations == "trajectory":  # all stages in one run; guidance is not counted
        samples, sums = config.trajectory.samples * config.steps, stages
    forward = 2.0 * adapter.macs(denoiser).total * samples
    hessian = elimination = 0.0
    for layer in layers:
        n, readers = layer.groups * layer.width, len(layer.readers)
        m = sum(denoiser.get_submodule(r.module).weight.shape[0] for r in layer.readers)
        hessian += samples * layer.tokens * n * (n + 1)
        # Inverse 5/3 n^3, G = W^T W, and panels of about 4 n^3 for a trajectory to its end.
        elimination += stages * (readers * (5 / 3 + 4) * n**3 + 2.0 * m * n**2)
    widths = input_widths(layers)
    widest = max(widths.values())
    batch = sum(1 for n in widths.values() if n == widest)
    return {
        "hessian_bytes": float(sums * HessianBank.bytes_needed(widths)),
        "statistics_bytes": float(packed_bytes(layers, stages)),
        "elimination_bytes": 4.0 * 4 * batch * widest**2,
        "rate": rate,
        "seconds": (forward + hessian + elimination / _ELIMINATION_SHARE) / rate,
    }


def measure_rate(device: torch.device, dtype: torch.dtype, size: int = 768) -> float:
    """Time a square matrix product and return operations a second (best of five)."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
