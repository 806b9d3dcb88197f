"""Checks of public functions: ``<function>: <argument> must be <rule>, got <value>. <cure>``."""

from typing import Any

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def require(holds: bool, function: str, argument: str, rule: str, value: Any, cure: str) -> None:
    """Raise a ValueError that names the argument, the rule, the value and the cure."""
    if not holds:
        raise ValueError(f"{function}: {argument} must be {rule}, got {value}. {cure}")


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """Return dtypes in words: ``float32 or float64``."""
    words = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def describe(tensor: Tensor) -> str:
    """Return dtype, shape and device of a tensor for a message."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def require_tensor(
    function: str,
    argument: str,
    tensor: Tensor,
    *,
    dims: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    like: Tensor | None = None,
) -> None:
    """Check the number of dimensions, the dtype and, against ``like``, the device."""
    require(
        isinstance(tensor, Tensor),
        function,
        argument,
        "a torch tensor",
        type(tensor).__name__,
        "Convert it with torch.as_tensor().",
    )
    require(
        tensor.dim() in dims,
        function,
        argument,
        f"a tensor of {' or '.join(map(str, dims))} dimensions",
        describe(tensor),
        "Reshape it.",
    )
    require(
        tensor.dtype in dtypes, function, argument, names(dtypes), describe(tensor), "Convert it."
    )
    if like is not None:
        require(
            tensor.device == like.device,
            function,
            argument,
            f"on {like.device} like the other tensors",
            describe(tensor),
            "Move it with .to().",
        )


def require_square(function: str, argument: str, matrix: Tensor) -> None:
    """Check that the last two dimensions are equal and not zero."""
    require(
        matrix.shape[-1] == matrix.shape[-2] and matrix.shape[-1] > 0,
        function,
        argument,
        "square, with at least one column",
        describe(matrix),
        "Pass the matrix H of one layer, or a batch of them.",
    )
    require(
        matrix.dim() == 2 or matrix.shape[0] > 0,
        function,
        argument,
        "a batch of at least one matrix",
        describe(matrix),
        "Leave out layers that are not there.",
    )


def require_layer(
    function: str, weight: Tensor, h: Tensor, dims: tuple[int, ...], index: str = ""
) -> None:
    """Check a layer, or a batch of them: weight (..., m, n), finite, and H (..., n, n).

    ``index`` is that of the layer where the arguments are sequences ``weights`` and ``hs``.
    """
    plural = f"s{index}" if index else ""
    w_name, h_name = f"weight{plural}", f"h{plural}"
    require_tensor(function, h_name, h, dims=dims, dtypes=WIDE)
    require_square(function, h_name, h)
    require_tensor(function, w_name, weight, dims=(h.dim(),), dtypes=FLOATS, like=h)
    shape = ", ".join(map(str, (*h.shape[:-2], "m", h.shape[-1])))
    require(
        weight.shape[:-2] == h.shape[:-2] and weight.shape[-1] == h.shape[-1],
        function,
        w_name,
        f"({shape}) to match {h_name}",
        describe(weight),
        "H is that of the layer's input columns.",
    )
    require(
        weight.shape[-2] > 0,
        function,
        w_name,
        "of at least one row",
        describe(weight),
        "There is nothing to prune.",
    )
    finite = all_finite(weight.unsqueeze(0) if weight.dim() == 2 else weight)
    require(
        bool(finite.all()),
        function,
        w_name,
        "finite",
        f"NaN or infinity in batch {bad_entries(~finite)}",
        "The checkpoint is damaged, or was cast to too narrow a type.",
    )


def require_removals(function: str, columns: int, group_size: int, count: int | None) -> int:
    """Check the width of a group and the number of groups to remove; return that number."""
    require(
        group_size >= 1 and columns % group_size == 0,
        function,
        "group_size",
        f"a divisor of the {columns} columns",
        group_size,
        "Use 1 for neurons and the width of a head for heads.",
    )
    groups = columns // group_size
    count = groups if count is None else count
    require(
        0 <= count <= groups,
        function,
        "count",
        f"between 0 and {groups}, the number of groups",
        count,
        "Leave it out for the whole trajectory.",
    )
    return count


def require_damping(function: str, damping: float) -> None:
    """Check a damping: a share of mean(diag H), finite and not negative."""
    require(
        0 <= damping < float("inf"),
        function,
        "damping",
        "finite and at least 0",
        damping,
        "It is a share of the mean of diag(H); 0.01 is usual.",
    )


def bad_entries(flags: Tensor, first: int = 0) -> str:
    """Return the numbers of the set flags of a batch, from ``first`` on: ``entries 0, 3``."""
    indices = [str(first + i) for i in torch.nonzero(flags).flatten().tolist()]
    return ("entry " if len(indices) == 1 else "entries ") + ", ".join(indices)


def all_finite(tensor: Tensor) -> Tensor:
    """Return for each batch entry of a (B, ...) tensor whether it is finite, without a copy."""
    if tensor.numel() == 0:
        return torch.ones(tensor.shape[0], dtype=torch.bool, device=tensor.device)
    # One reduction an entry: a reduction over a dimension runs 25 times slower on the CPU.
    bounds = torch.stack([torch.stack(torch.aminmax(entry)) for entry in tensor])
    return torch.isfinite(bounds).all(1)
