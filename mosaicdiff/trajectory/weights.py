"""How much each step of a sampled trajectory counts in the Hessians."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

WEIGHTS = ("log_decrease", "linear_decrease", "uniform", "linear_increase", "log_increase")


def step_weights(
    kind: str | Sequence[float] | Callable[[int, int], float],
    steps: int,
    weight_range: tuple[float, float] = (0.8, 1.2),
) -> tuple[float, ...]:
    """Return the weight of every sampling step, noisiest first.

    `log_decrease`: w_i = w_min + (w_max - w_min) ln(N - i) / ln(N) for i = 0..N-1;
    `linear_decrease` has (N - 1 - i) / (N - 1) for the logarithms; the increasing kinds are these
    read backwards; `uniform` is 1 throughout. One step has w_max.

    Args:
        kind: a name of `WEIGHTS`, the weights themselves, or a function of (i, N).
        steps: N.
        weight_range: w_min and w_max of a named kind.

    Returns:
        (N,) positive finite numbers.

    Raises:
        ValueError: the weights are not so many, or not such.

    Source: OBS-Diff (arXiv 2510.06751).
    """
    if callable(kind):
        weights = [float(kind(i, steps)) for i in range(steps)]
    elif isinstance(kind, str):
        weights = _named(kind, steps, *weight_range)
    else:
        weights = [float(weight) for weight in kind]
    if len(weights) != steps:
        raise ValueError(
            f"step_weights: weights must be {steps}, one for each sampling step, "
            f"got {len(weights)}."
        )
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if wrong:
        raise ValueError(
            f"step_weights: weights must be finite and more than 0, got {wrong[0]}. "
            "Leave steps out by sampling with fewer."
        )
    return tuple(weights)


def _named(kind: str, steps: int, least: float, largest: float) -> list[float]:
    if kind not in WEIGHTS:
        raise ValueError(f"step_weights: kind must be one of {', '.join(WEIGHTS)}, got {kind!r}.")
    if kind == "uniform":
        return [1.0] * steps
    if steps == 1:
        return [largest]
    left = range(steps - 1, -1, -1)  # N - 1 - i
    if kind.startswith("log"):
        shares = [math.log(1 + n) / math.log(steps) for n in left]
    else:
        shares = [n / (steps - 1) for n in left]
    if kind.endswith("increase"):
        shares.reverse()
    return [least + (largest - least) * share for share in shares]
