"""What a genome means: levels of equal cost, and the groups that they remove."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..allocation.allocator import Allocator
from ..allocation.optimal import Item, OptimalPath
from ..allocation.planning import PrunePlan
from .evolution import Genome


@dataclass(frozen=True)
class _Gene:
    """One gene: the items it decides over, and the most that they can save."""

    items: tuple[int, ...]
    most: float


class Genetics:
    """Translate between genomes and plans that all save the same.

    A level of any gene saves the same cost, so that moving levels between genes keeps the
    budget. The genes are the stages (whose layers share a level as `within` says), or every
    layer of every stage.

    Args:
        allocator: of the request.
        start: the plan that says how much is saved.
        unit: of the budget, one whose savings add up: `sparsity` or `macs`.

    Raises:
        ValueError: the layers of several stages are tied together, and the genes are stages.
    """

    def __init__(self, allocator: Allocator, start: PrunePlan, unit: str) -> None:
        config = allocator.config
        self._allocator, self._search = allocator, config.search
        self._path = allocator.path(unit)
        self._items: list[Item] = self._path.items
        self._savings = allocator.costs.savings(unit)
        self._target = self._saving_of(start)
        self._paths: dict[tuple[int, ...], OptimalPath] = {}
        self._genes = self._make_genes(config.choice)
        total = sum(gene.most for gene in self._genes)
        wished = total / (config.search.levels * len(self._genes))
        # The quantum divides what is to be saved, so that whole levels come to it exactly.
        whole = max(1, round(self._target / wished))
        self._quantum = self._target / whole if self._target > 0 else wished
        self.limits = tuple(int(self._capped(gene) / self._quantum + 1e-9) for gene in self._genes)

    def _capped(self, gene: _Gene) -> float:
        """Return the most that a gene can save under the cap of a stage."""
        if self._search.genes == "layers":
            return gene.most
        if self._search.within == "optimal":
            return self._path_of(gene).total
        share = sum(
            float(share[-1]) for i in gene.items for share in self._items[i].shares.values()
        )
        return gene.most * min(1.0, self._allocator.config.max_sparsity / share)

    def _make_genes(self, choice: str) -> list[_Gene]:
        if self._search.genes == "layers":
            return [_Gene((i,), float(item.savings[-1])) for i, item in enumerate(self._items)]
        if choice == "shared":
            raise ValueError(
                "search: genes must be layers with choice 'shared', got 'stages': all stages "
                "keep the same groups."
            )
        genes = []
        for stage in range(len(self._allocator.frame.steps)):
            mine = [i for i, item in enumerate(self._items) if item.members[0][0] == stage]
            genes.append(_Gene(tuple(mine), sum(float(self._items[i].savings[-1]) for i in mine)))
        return genes

    def _saving_of(self, plan: PrunePlan) -> float:
        return sum(
            float(self._savings[k][i][count])
            for k, row in enumerate(plan.removed)
            for i, count in enumerate(row)
        )

    def encode(self, plan: PrunePlan) -> Genome:
        """Return the genome closest to a plan; its levels sum to those of every other."""
        spent = []
        for gene in self._genes:
            members = [pair for i in gene.items for pair in self._items[i].members]
            spent.append(sum(float(self._savings[k][i][plan.removed[k][i]]) for k, i in members))
        total = round(self._target / self._quantum)
        exact = np.minimum(np.asarray(spent) / self._quantum, self.limits)
        levels = np.floor(exact + 1e-9).astype(int)
        while levels.sum() < total:  # largest remainder first, among those that can give more
            room = levels < np.asarray(self.limits)
            if not room.any():
                break
            levels[int(np.argmax(np.where(room, exact - levels, -np.inf)))] += 1
        while levels.sum() > total:
            levels[int(np.argmax(np.where(levels > 0, levels - exact, -np.inf)))] -= 1
        return tuple(int(level) for level in levels)

    def decode(self, genome: Genome) -> PrunePlan:
        """Return the plan of a genome; what rounding leaves over is evened out at least error."""
        if self._search.genes == "layers":
            return self._decode_layers(genome)
        levels = np.zeros(len(self._items), dtype=np.int64)
        for gene, level in zip(self._genes, genome, strict=True):
            if level:
                levels[list(gene.items)] = self._within(gene, level * self._quantum)
        self._path.even_out(levels, self._target)
        return self._allocator.plan_of(self._path.removed(levels))

    def _within(self, gene: _Gene, saving: float) -> np.ndarray:
        items = [self._items[i] for i in gene.items]
        if self._search.within == "uniform":
            share = saving / gene.most
            return np.array([_nearest(item.savings, share * item.savings[-1]) for item in items])
        return self._path_of(gene).levels(saving)

    def _path_of(self, gene: _Gene) -> OptimalPath:
        if gene.items not in self._paths:
            self._paths[gene.items] = OptimalPath(
                [self._items[i] for i in gene.items],
                len(self._allocator.frame.steps),
                len(self._allocator.layers),
                self._allocator.config.max_sparsity,
            )
        return self._paths[gene.items]

    def _decode_layers(self, genome: Genome) -> PrunePlan:
        levels = np.array(
            [
                _nearest(item.savings, level * self._quantum)
                for item, level in zip(self._items, genome, strict=True)
            ],
            dtype=np.int64,
        )
        self._path.even_out(levels, self._target)
        return self._allocator.plan_of(self._path.removed(levels))

    def seeds(self, names: Sequence[str], budget_plan: PrunePlan) -> list[Genome]:
        """Return the genomes that a search starts from, without doubles."""
        plans = []
        for name in names:
            if name == "optimal":
                plans.append(budget_plan)
            elif self._allocator.config.granularity == "structured":  # shares fit no whole layers
                plans.append(self._allocator.meet(self._allocator.config.budget, name))
        if not plans:
            plans.append(budget_plan)
        return list(dict.fromkeys(self.encode(plan) for plan in plans))


def _nearest(savings: np.ndarray, wanted: float) -> int:
    index = int(np.searchsorted(savings, wanted))
    if index == len(savings):
        return index - 1
    if index > 0 and wanted - savings[index - 1] <= savings[index] - wanted:
        return index - 1
    return index
