"""What every trajectory of removals holds, and the columns that it leaves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mosaic_kernels import _checks


@dataclass(frozen=True, eq=False)
class Removals:
    """Groups of columns in order of removal; its kinds say what the shapes of the rest are.

    Args:
        order: (B, K) int64, group indices in order of removal.
        losses: (B, ..., K) float64, what each removal adds to a squared error.
        damping: (B, ...) float64 on the CPU, the damping that was used.
        group_size: columns in a group.
        columns: input columns, before pruning.
    """

    order: Tensor
    losses: Tensor
    damping: Tensor
    group_size: int
    columns: int

    def kept(self, level: int, entry: int = 0) -> Tensor:
        """Return the sorted columns that are left after the first ``level`` removals.

        Args:
            level: number of removed groups, 0 to K.
            entry: which layer of the batch.

        Returns:
            (columns - level * group_size,) int64, on the device of ``order``.

        Raises:
            ValueError: ``level`` or ``entry`` is out of range.
        """
        batch, count = self.order.shape
        for label, value, end in (("level", level, count + 1), ("entry", entry, batch)):
            _checks.require(
                0 <= value < end,
                f"{type(self).__name__}.kept",
                label,
                f"between 0 and {end - 1}",
                value,
                "Prune with a larger count to go further."
                if label == "level"
                else "The trajectory holds one entry for each layer of the batch.",
            )
        alive = torch.ones(
            self.columns // self.group_size, dtype=torch.bool, device=self.order.device
        )
        alive[self.order[entry, :level]] = False
        return torch.nonzero(alive.repeat_interleave(self.group_size)).flatten()
