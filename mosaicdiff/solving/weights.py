"""Remove single weights of a linear layer. Mathematics only: tensors in, tensors out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mosaic_kernels import prune_weights

from ..config_checks import CRITERIA
from ..statistics.bank import Statistics

#: DSnoT's constants: cycles at most, and the expected error that is small enough, in the units
#: of the layer's output.
DSNOT_CYCLES, DSNOT_THRESHOLD = 50, 0.1


@dataclass(frozen=True, eq=False)
class WeightSolution:
    """A linear layer without some of its weights.

    Args:
        weight: (m, n) in the dtype that was given, +0 where pruned.
        mask: (m, n) bool, True where a weight is kept.
        error: squared error of the output on the calibration set, over its energy:
            trace((W - W') H (W - W')^T) / trace(W H W^T), of the weights in their own dtype.
        damping: that was used, relative to the mean diagonal (0 where none was).
    """

    weight: torch.Tensor
    mask: torch.Tensor
    error: float
    damping: float


def prune_linear(
    weight: torch.Tensor,
    statistics: Statistics,
    criterion: str,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    generator: torch.Generator | None = None,
) -> WeightSolution:
    """Set single weights of a linear layer to zero, by share or by pattern.

    | criterion | goes first | by share, within |
    |---|---|---|
    | `obs` | least W_ij^2 / U_jj^2, others compensated (`mosaic_kernels.prune_weights`) | blocks |
    | `magnitude` | least abs(W_ij) | the layer |
    | `wanda` | least abs(W_ij) * sqrt(H_jj), arXiv 2306.11695 | each row |
    | `dsnot` | as Wanda, then swapped: `swap_weights` | each row |
    | `random` | drawn | the layer |

    With a pattern all compare within every group of consecutive weights along a row. Ties go to
    the lowest row, then column. All but `obs` leave the kept weights as they are. Columns that
    never fired (H_jj = 0) are the first to go by `obs`, `wanda` and `dsnot`; `magnitude` and
    `random` do not look at the input.

    Args:
        weight: (m, n), any floating type.
        statistics: of the layer's input.
        criterion: one of the above.
        sparsity: share to remove, in [0, 1]. `obs`, `magnitude` and `random` remove
            round(sparsity * m * n), `wanda` and `dsnot` round(sparsity * n) of every row. `obs`
            removes more only where columns that never fired are more; 0 and 1 are exact. Either
            this or `pattern`.
        pattern: (keep, of): keep `keep` of every `of` consecutive weights along a row.
        damping: of `obs`, relative to the mean of the Hessian's diagonal.
        generator: of `random`.

    Raises:
        ValueError: an argument is not as described, or not finite.
        RuntimeError: H has no Cholesky factor at any damping.
    """
    _check(weight, statistics, criterion, sparsity, pattern, generator)
    weight = weight.detach()
    hessian = statistics.hessian.to(weight.device)
    if pattern is None and sparsity in (0, 1):  # nothing to choose, and no factor needed
        mask = torch.full(weight.shape, sparsity == 0, device=weight.device)
        return _solution(weight, weight.masked_fill(~mask, 0.0), mask, hessian, 0.0)
    if criterion == "obs":
        swept = prune_weights(weight, hessian, sparsity=sparsity, pattern=pattern, damping=damping)
        pruned = swept.weight.masked_fill(~swept.mask, 0.0)  # no -0 among the zeros
        return _solution(weight, pruned, swept.mask, hessian, float(swept.damping[0]))
    mask = _baseline_mask(weight, statistics, criterion, sparsity, pattern, generator)
    return _solution(weight, weight.masked_fill(~mask, 0.0), mask, hessian, 0.0)


def swap_weights(
    weight: torch.Tensor,
    mask: torch.Tensor,
    statistics: Statistics,
    *,
    group: int,
    cycles: int = DSNOT_CYCLES,
    threshold: float = DSNOT_THRESHOLD,
) -> torch.Tensor:
    """Swap kept for pruned weights until each row's expected output error is small.

    With c_j = W_rj E[x_j], a row's expected error is e = sum of c_j over its pruned j. A cycle
    grows the pruned weight of largest sign(e) c_j / Var[x_j], and prunes the kept one of least
    abs(W_rj) sqrt(H_jj) among those whose removal pulls e towards zero: sign(e) c_j < 0. A row
    stops after `cycles`, once abs(e) < `threshold`, or when e changes its sign.

    **chosen**, where the paper leaves it open: a weight is grown only if that lessens abs(e)
    (sign(e) c_j > 0); the swap that changes the sign is made only if it lessens abs(e); a
    weight of a group is grown only while the group has one to prune for it, so that the best
    weight of all rows' groups may be passed over; ties go to the lowest column.

    As the sign is that of the beginning until a row stops, no weight is swapped twice and the
    swaps of a row are known at once: the rows need no loop.

    Args:
        weight: (m, n).
        mask: (m, n) bool, to start from.
        statistics: of the layer's input.
        group: swaps stay within so many consecutive weights of a row; n for the whole row.
        cycles: swaps a row, at most.
        threshold: of abs(e), in the units of the layer's output.

    Returns:
        (m, n) bool, with as many kept in every group as before.

    Source: DSnoT (Zhang et al., ICLR 2024, arXiv 2310.08915).
    """
    rows, n = weight.shape
    device = weight.device
    mean = statistics.mean.to(device, torch.float64)
    square = statistics.hessian.diagonal().to(device, torch.float64).clamp(min=0)
    # Rounding can leave less than nothing of a constant input's variance.
    tiny = torch.finfo(torch.float64).tiny
    variance = torch.maximum(square - mean**2, 1e-12 * square + tiny)
    wide = weight.double()
    expected = wide * mean
    error = expected.masked_fill(mask, 0.0).sum(1)
    pull = error.sign()[:, None] * expected
    never = float("-inf")
    gain = (pull / variance).masked_fill(mask | (pull <= 0), never).reshape(-1, group)
    worth = (wide.abs() * square.sqrt()).masked_fill(~mask | (pull >= 0), float("inf"))
    gain, grown = gain.sort(dim=1, descending=True, stable=True)
    worth, dropped = worth.reshape(-1, group).sort(dim=1, stable=True)
    # The k-th to grow of a group goes with the k-th to prune.
    gain = gain.masked_fill(worth.isinf(), never)
    first = torch.arange(0, n, group, device=device).repeat(rows)[:, None]
    gain, order = gain.reshape(rows, n).sort(dim=1, descending=True, stable=True)
    gain, order = gain[:, :cycles], order[:, :cycles]
    grown = (grown + first).reshape(rows, n).gather(1, order)
    dropped = (dropped + first).reshape(rows, n).gather(1, order)
    possible = ~gain.isinf()
    steps = (pull.gather(1, grown) - pull.gather(1, dropped)).masked_fill(~possible, 0.0)
    after = error.abs()[:, None] - steps.cumsum(1)
    before = after + steps
    made = possible & (before >= threshold) & (after.abs() < before)
    made = made.long().cumprod(1).bool()
    swapped = mask.clone()
    row = torch.arange(rows, device=device)[:, None].expand_as(made)
    swapped[row[made], grown[made]] = True
    swapped[row[made], dropped[made]] = False
    return swapped


def _check(
    weight: torch.Tensor,
    statistics: Statistics,
    criterion: str,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    generator: torch.Generator | None,
) -> None:
    if criterion not in CRITERIA:
        raise ValueError(
            f"prune_linear: criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}."
        )
    if weight.ndim != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise ValueError(
            f"prune_linear: weight must be (m, n), floating and finite, got {tuple(weight.shape)} "
            f"{weight.dtype}. Prune the weight of a linear layer that is not quantised."
        )
    n = weight.shape[1]
    if statistics.hessian.shape != (n, n) or statistics.mean.shape != (n,):
        raise ValueError(
            f"prune_linear: statistics must be of the {n} inputs, got a Hessian of "
            f"{tuple(statistics.hessian.shape)}. Take those of this layer's input."
        )
    if (sparsity is None) == (pattern is None):
        raise ValueError(
            f"prune_linear: sparsity must be given, or else pattern, got {sparsity} and {pattern}. "
            "Pass sparsity=0.5, or pattern=(2, 4)."
        )
    if sparsity is not None and not (math.isfinite(sparsity) and 0 <= sparsity <= 1):
        raise ValueError(
            f"prune_linear: sparsity must be in [0, 1], got {sparsity}. "
            "It is the share of the weights that are set to zero."
        )
    if pattern is not None:
        keep, of = pattern
        if not 1 <= keep < of:
            raise ValueError(
                f"prune_linear: pattern must be (keep, of) with 1 <= keep < of, got {pattern}. "
                "(2, 4) keeps 2 of every 4 weights."
            )
        if n % of:
            raise ValueError(
                f"prune_linear: pattern must be of groups that divide the {n} inputs, got "
                f"{keep}:{of}. Leave this linear whole by `exclude`, or choose another pattern."
            )
    if criterion == "random" and generator is None:
        raise ValueError(
            "prune_linear: generator must be given with criterion 'random', got None. "
            "Pass a seeded torch.Generator."
        )


def _baseline_mask(
    weight: torch.Tensor,
    statistics: Statistics,
    criterion: str,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Return what a criterion without compensation keeps, (m, n) bool."""
    m, n = weight.shape
    if pattern is not None:
        group, count = pattern[1], pattern[1] - pattern[0]
    else:
        assert sparsity is not None
        group = n if criterion in ("wanda", "dsnot") else m * n
        count = round(sparsity * group)
    if criterion == "random":
        assert generator is not None
        scores = torch.rand(m, n, generator=generator, device=generator.device).to(weight.device)
    else:
        scores = weight.double().abs()
    if criterion in ("wanda", "dsnot"):
        square = statistics.hessian.diagonal().to(weight.device, torch.float64)
        scores = scores * square.clamp(min=0).sqrt()
    mask = ~_lowest(scores.reshape(-1, group), count).reshape(m, n)
    if criterion == "dsnot":
        return swap_weights(weight, mask, statistics, group=group)
    return mask


def _lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` least of each row, (r, g) bool; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = scores.kthvalue(count, dim=1, keepdim=True).values
    below, level = scores < bound, scores == bound
    return below | (level & (level.cumsum(1) <= count - below.sum(1, keepdim=True)))


def _solution(
    weight: torch.Tensor,
    pruned: torch.Tensor,
    mask: torch.Tensor,
    hessian: torch.Tensor,
    damping: float,
) -> WeightSolution:
    dense, second_order = weight.double(), hessian.double()
    lost, energy = (
        float(((matrix @ second_order) * matrix).sum()) for matrix in (dense - pruned, dense)
    )
    return WeightSolution(pruned, mask, lost / energy if energy > 0 else 0.0, damping)
