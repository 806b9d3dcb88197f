"""The host's copy of what stages do not share: writers once, readers for each stage, as on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..surgery import Surgeon


@dataclass(eq=False)
class Shelf:
    """A tensor of the bank; one identity, whatever type it is cast to."""

    tensor: torch.Tensor

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def cast(self, dtype: torch.dtype, pinned: bool) -> None:
        """Change the type, and whether the host's memory is page-locked."""
        self.tensor = self.tensor.to(dtype)
        if pinned and self.tensor.numel() and not self.tensor.is_pinned():
            self.tensor = self.tensor.pin_memory()


@dataclass(frozen=True, eq=False)
class Source:
    """Where the values of a parameter of a stage are.

    Args:
        shelf: of the bank.
        axis: of its tensor, along which the stages' groups lie.
        index: int64, which of them the stage holds and in what order; None is all, as they are.
    """

    shelf: Shelf
    axis: int = 0
    index: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        shape = list(self.shelf.tensor.shape)
        if self.index is not None:
            shape[self.axis] = len(self.index)
        return torch.Size(shape)

    def gather(self, device: torch.device) -> torch.Tensor:
        """Return the values on a device; on the host what needs no gathering is not copied.

        To a GPU they go through page-locked memory, so that the host does not wait for the copy.
        """
        held = self.shelf.tensor
        if self.index is not None:
            pinned = device.type == "cuda"
            out = torch.empty(self.shape, dtype=held.dtype, device=held.device, pin_memory=pinned)
            held = torch.index_select(held, self.axis, self.index.to(held.device), out=out)
        return held.to(device, non_blocking=True)


def fill_shelves(
    surgeon: Surgeon,
    kept: Sequence[Mapping[str, torch.Tensor]],
    held: Mapping[str, Sequence[tuple[int, torch.Tensor]]],
    unions: Mapping[str, bool] | None = None,
) -> Iterator[tuple[str, list[Source]]]:
    """Say of every parameter where its stages' values are; what they agree on is held once.

    One parameter after the other: what the caller lets go of makes room for the next.

    Args:
        surgeon: of the denoiser and its layers.
        kept: for each stage, groups of every layer that is not whole.
        held: by the parameter's name, stages and what they hold.
        unions: which parameters are one tensor to all stages; by default those are whose values
            agree. On the meta device, which holds none, slices of writers do.
    """
    for name, rows in held.items():
        tensors = [_on_host(tensor.detach()) for _, tensor in rows]
        positions = [surgeon.positions(name, kept[k], tensor.shape) for k, tensor in rows]
        sources = None
        if unions is None or unions.get(name, False):
            sources = _union(tensors, positions, unions is not None)
        yield name, sources or [Source(Shelf(tensor)) for tensor in tensors]


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the host that keeps no more than itself alive."""
    if tensor.is_meta:
        return tensor
    tensor = tensor.cpu()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def _union(
    tensors: Sequence[torch.Tensor],
    positions: Sequence[tuple[int, torch.Tensor] | None],
    agreed: bool,
) -> list[Source] | None:
    """Merge slices of one dense parameter; None where they are none, or disagree."""
    found = [position for position in positions if position is not None]
    if len(found) < len(tensors) or len({axis for axis, _ in found}) > 1:
        return None
    axis = found[0][0]
    if any(len(i) != t.shape[axis] for (_, i), t in zip(found, tensors, strict=True)):
        return None
    union = torch.cat([index for _, index in found]).unique()
    shape = list(tensors[0].shape)
    shape[axis] = len(union)
    merged = tensors[0].new_empty(shape)
    places = [torch.searchsorted(union, index) for _, index in found]
    if merged.is_meta:
        if not agreed and axis != 0:
            return None
    else:
        for place, tensor in zip(places, tensors, strict=True):
            merged.index_copy_(axis, place, tensor)
        pairs = zip(places, tensors, strict=True)
        if not all(torch.equal(merged.index_select(axis, place), t) for place, t in pairs):
            return None
    shelf, whole = Shelf(merged), torch.arange(len(union))
    return [Source(shelf, axis, None if torch.equal(p, whole) else p) for p in places]
