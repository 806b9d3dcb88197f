"""What the user wants to pay, in the unit they care about. Pure functions of numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

#: Units of a budget; at most one is given.
UNITS = ("sparsity", "macs", "params", "size", "latency", "quality")
DEFAULT_SPARSITY = 0.3
#: How far the reached cost may lie from the one asked for, as a share of it.
TOLERANCE = 0.02

_POWERS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_SUFFIXES: Mapping[str, Mapping[str, float]] = {
    "macs": _POWERS,
    "params": _POWERS,
    "size": {
        "B": 1.0,
        "kB": 1e3,
        "MB": 1e6,
        "GB": 1e9,
        "TB": 1e12,
        "KiB": 2.0**10,
        "MiB": 2.0**20,
        "GiB": 2.0**30,
    },
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
}
_EXAMPLES = {
    "sparsity": "0.3 or 30%",
    "macs": "0.6x of the dense model's, or 3.9T an image",
    "params": "0.8x, or 450M",
    "size": "0.8x, or 1.2GB",
    "latency": "0.7x, or 25ms a call",
    "quality": "0.01, the squared error of the final latents over their energy",
}

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Budget:
    """One budget.

    Args:
        unit: of `UNITS`: `sparsity` (share of the prunable MACs removed, mean over the steps),
            `macs` (of one image, all steps, attention products counted, no guidance),
            `params` and `size` (what the checkpoint's weights hold, all stages together; bytes),
            `latency` (milliseconds of a call, mean over the steps), `quality` (mean squared
            error of the final latents to the dense model's, over the mean square of those).
        value: in that unit; of the dense model's where `relative`.
        relative: whether the value multiplies what the dense model costs.
    """

    unit: str
    value: float
    relative: bool = False

    @classmethod
    def parse(cls, unit: str, given: str | float) -> Budget:
        """Read a budget such as `0.6x`, `3.9T`, `1.2GB`, `25ms`, `30%` or a number.

        Raises:
            ValueError: the unit or the number cannot be read, or is out of range.
        """
        if unit not in UNITS:
            raise ValueError(
                f"budget: unit must be one of {', '.join(UNITS)}, got {unit!r}. "
                f"E.g. {_EXAMPLES['macs']}."
            )
        text = str(given).strip()
        match = re.fullmatch(r"([0-9.eE+-]*[0-9.])\s*([A-Za-z%]*)", text)
        number = _number(match.group(1)) if match else None
        if match is None or number is None:
            raise _unreadable(unit, given)
        suffix = match.group(2)
        relative = suffix == "x" and unit not in ("sparsity", "quality")
        if relative:
            scale = 1.0
        elif unit in ("sparsity", "quality"):
            scale = {"": 1.0, "%": 0.01}.get(suffix, math.nan)
        else:
            scale = _SUFFIXES[unit].get(suffix, math.nan)
        if math.isnan(scale):
            raise _unreadable(unit, given)
        budget = cls(unit, number * scale, relative)
        budget._check(given)
        return budget

    def _check(self, given: str | float) -> None:
        if not math.isfinite(self.value):
            raise _unreadable(self.unit, given)
        if self.unit == "sparsity":
            if not 0 <= self.value < 1:
                raise ValueError(
                    f"PruneConfig: sparsity must be in [0, 1), got {given}. "
                    "It is a share of the prunable MACs, e.g. 0.3."
                )
        elif self.value <= 0:
            raise ValueError(
                f"budget: {self.unit} must be more than 0, got {given}. "
                f"E.g. {_EXAMPLES[self.unit]}."
            )

    def target(self, dense: float) -> float:
        """Return the value wanted, given what the dense model costs in the same unit."""
        return self.value * dense if self.relative else self.value

    def __str__(self) -> str:
        if self.relative:
            return f"{self.unit} {self.value:g}x"
        if self.unit == "sparsity":
            return f"sparsity {100 * self.value:g}%"
        return f"{self.unit} {self.value:g}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _unreadable(unit: str, given: str | float) -> ValueError:
    return ValueError(f"budget: {unit} must be such as {_EXAMPLES[unit]}, got {given!r}.")


def meet(
    budget: Budget,
    dense: float,
    plan_at: Callable[[float], Plan],
    cost_of: Callable[[Plan], float],
    describe: Callable[[float], str] = lambda cost: f"{cost:.6g}",
) -> Plan:
    """Find the plan whose cost comes closest to a budget, by bisection.

    Args:
        budget: of any unit but `quality`.
        dense: what the dense model costs in that unit (0 for sparsity).
        plan_at: the plan at effort x in [0, 1]: 0 removes nothing, 1 all that may go. The more
            effort, the less cost (or the more sparsity), give or take a rounding.
        cost_of: what a plan costs in the unit, as it will be measured.
        describe: formats a cost for a message.

    Raises:
        ValueError: no plan comes within `TOLERANCE`; the message says what can be had.
    """
    wanted = budget.target(dense)
    sign = 1.0 if budget.unit == "sparsity" else -1.0
    low, high = 0.0, 1.0
    ends = [plan_at(low), plan_at(high)]
    costs = [cost_of(plan) for plan in ends]
    best = min(range(2), key=lambda i: abs(costs[i] - wanted))
    found, reached = ends[best], costs[best]
    if sign * (wanted - costs[0]) > 0 > sign * (wanted - costs[1]):
        for _ in range(48):
            middle = (low + high) / 2
            plan = plan_at(middle)
            cost = cost_of(plan)
            if abs(cost - wanted) < abs(reached - wanted):
                found, reached = plan, cost
            if sign * (wanted - cost) > 0:
                low = middle
            else:
                high = middle
    if abs(reached - wanted) > TOLERANCE * abs(wanted) + 1e-12:
        span = f"{describe(min(costs))} to {describe(max(costs))}"
        raise ValueError(
            f"budget: {budget} must be within {TOLERANCE:.0%} of what can be had, but the closest "
            f"is {describe(reached)} for the {describe(wanted)} asked. These settings reach "
            f"{span}; ask for what can be had, or allow finer steps (granularity, round_to)."
        )
    return found
