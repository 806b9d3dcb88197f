"""Take from every layer of every stage what it loses least by. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Item:
    """One decision: how far some layers of some stages are cut, together.

    Args:
        members: (stage, layer) indices of what is cut.
        removed: (levels, members) groups removed of each member; level 0 removes none.
        errors: (levels,) what each level costs in quality; 0 at level 0.
        savings: (levels,) what each level saves; 0 at level 0, never falling.
        shares: for each stage concerned, (levels,) share of its prunable MACs that is removed.
    """

    members: tuple[tuple[int, int], ...]
    removed: np.ndarray
    errors: np.ndarray
    savings: np.ndarray
    shares: Mapping[int, np.ndarray]


def lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Return the indices of the lower convex hull of points with x never falling, from the first.

    Of points with equal x only the lowest counts, but the first point always does.
    """
    hull = [0]
    for i in range(1, len(x)):
        if x[i] <= x[hull[-1]]:
            if len(hull) == 1 or y[i] >= y[hull[-1]]:
                continue
            hull.pop()
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


class OptimalPath:
    """Steps of least error per saving, over all items at once, in the order they are taken.

    On convex error curves the first steps of this order are the best there is for what they
    save (a fractional knapsack); curves are made convex by their lower hull. What is left to a
    target after the last whole step is saved where it costs the least error.

    Args:
        items: the decisions.
        stages: how many.
        layers: how many.
        max_share: the largest share of its prunable MACs that a stage may give.
    """

    def __init__(
        self, items: Sequence[Item], stages: int, layers: int, max_share: float = 1.0
    ) -> None:
        self.items = list(items)
        self._shape = (stages, layers)
        self._max_share = max_share
        self._take_steps()

    def _take_steps(self) -> None:
        steps = []
        for i, item in enumerate(self.items):
            hull = lower_hull(item.savings, item.errors)
            for a, b in zip(hull, hull[1:], strict=False):
                slope = (item.errors[b] - item.errors[a]) / (item.savings[b] - item.savings[a])
                steps.append((slope, i, a, b))
        steps.sort(key=lambda step: (step[0], step[1], step[2]))
        used = np.zeros(self._shape[0])
        taken, stuck = [], set()
        for _, i, a, b in steps:
            item = self.items[i]
            if i in stuck:
                continue
            if not self._fits(item, a, b, used):
                stuck.add(i)  # what of the step still fits is its last
                b = self._fitting(item, a, b, used)
                if item.savings[b] <= item.savings[a]:
                    continue
            for stage, share in item.shares.items():
                used[stage] += share[b] - share[a]
            taken.append((i, b, item.savings[b] - item.savings[a]))
        self._step_item = np.array([t[0] for t in taken], dtype=np.int64)
        self._step_level = np.array([t[1] for t in taken], dtype=np.int64)
        self._saved = np.concatenate([[0.0], np.cumsum([t[2] for t in taken])])
        self._largest = np.zeros(len(self.items), dtype=np.int64)
        for i, level, _ in taken:
            self._largest[i] = level

    def _fitting(self, item: Item, low: int, high: int, used: np.ndarray) -> int:
        """Return the highest level from `low` to `high` that leaves the stages under the cap."""
        while high > low and not self._fits(item, low, high, used):
            high -= 1
        return high

    def _fits(self, item: Item, low: int, high: int, used: np.ndarray) -> bool:
        """Tell whether going from one level to another leaves the stages under the cap."""
        return all(
            used[k] + share[high] - share[low] <= self._max_share + 1e-9
            for k, share in item.shares.items()
        )

    def _used(self, levels: np.ndarray) -> np.ndarray:
        """Return the share of its prunable MACs that every stage gives."""
        used = np.zeros(self._shape[0])
        for item, level in zip(self.items, levels, strict=True):
            for stage, share in item.shares.items():
                used[stage] += share[level]
        return used

    def _saving_of(self, levels: np.ndarray) -> float:
        return float(
            sum(item.savings[level] for item, level in zip(self.items, levels, strict=True))
        )

    @property
    def _tolerance(self) -> float:
        return 1e-9 * max(1.0, self.total)

    @property
    def total(self) -> float:
        """What is saved when every step is taken."""
        return float(self._saved[-1])

    def levels(self, saving: float) -> np.ndarray:
        """Return the level of every item at which so much is saved, or all there is."""
        count = int(np.searchsorted(self._saved, saving * (1 + 1e-12), side="right")) - 1
        levels = np.zeros(len(self.items), dtype=np.int64)
        levels[self._step_item[:count]] = self._step_level[:count]
        self._fill(levels, saving - self._saved[count])
        return levels

    def even_out(self, levels: np.ndarray, saving: float) -> None:
        """Change levels that save about so much so that they do, at the least error, in place.

        What is missing is taken from one item, or from several where no single one can give it
        under the cap; what is saved too much is given back, one item after the other, so far as
        the saving stays above what is asked for.
        """
        part = saving - self._saving_of(levels)
        while part > self._tolerance:
            if not self._fill(levels, part, whole=True):
                part /= 2
                continue
            part = saving - self._saving_of(levels)
        while self._give_back(levels, self._saving_of(levels) - saving):
            pass

    def _give_back(self, levels: np.ndarray, surplus: float) -> bool:
        """Lower the one item that gains most by giving back no more than a surplus."""
        if surplus <= self._tolerance:
            return False
        best, found = 0.0, None
        for i, item in enumerate(self.items):
            floor = item.savings[levels[i]] - surplus
            lower = int(np.searchsorted(item.savings, floor * (1 - 1e-12)))
            gain = item.errors[levels[i]] - item.errors[lower]
            if lower < levels[i] and gain > best:
                best, found = gain, (i, lower)
        if found is not None:
            levels[found[0]] = found[1]
        return found is not None

    def _fill(self, levels: np.ndarray, missing: float, whole: bool = False) -> bool:
        """Raise the one item that saves what is missing at the least error; tell if there is one.

        Args:
            whole: whether items may go beyond the last step that was taken, under the cap.
        """
        if missing <= self._tolerance:
            return False
        used = self._used(levels) if whole else None
        best, found = np.inf, None
        for i, item in enumerate(self.items):
            level = levels[i]
            end = len(item.savings) if whole else self._largest[i] + 1
            wanted = item.savings[level] + missing * (1 - 1e-9)
            reach = level + int(np.searchsorted(item.savings[level:end], wanted))
            if reach >= end or not item.errors[reach] - item.errors[level] < best:
                continue
            if used is None or self._fits(item, level, reach, used):
                best, found = item.errors[reach] - item.errors[level], (i, reach)
        if found is not None:
            levels[found[0]] = found[1]
        return found is not None

    def at(self, effort: float) -> tuple[tuple[int, ...], ...]:
        """Return the groups removed of each layer of each stage at an effort in [0, 1].

        The effort is the share of what can be saved at all.
        """
        return self.removed(self.levels(effort * self.total))

    def removed(self, levels: np.ndarray) -> tuple[tuple[int, ...], ...]:
        """Return the groups removed of each layer of each stage at the items' levels."""
        counts = np.zeros(self._shape, dtype=np.int64)
        for item, level in zip(self.items, levels, strict=True):
            for (stage, layer), count in zip(item.members, item.removed[level], strict=True):
                counts[stage, layer] = count
        return tuple(tuple(int(n) for n in row) for row in counts)

    def error(self, levels: np.ndarray) -> float:
        """Return the sum of the items' errors at their levels."""
        return float(
            sum(item.errors[level] for item, level in zip(self.items, levels, strict=True))
        )
