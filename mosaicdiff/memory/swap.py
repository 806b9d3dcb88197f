"""Keep one stage on the device and the others in the host's memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..surgery import Surgeon
from .bank import Shelf, Source, fill_shelves


@dataclass(eq=False)
class Slot:
    """A parameter that not all stages hold: of one of them, or of some that keep a layer whole.

    Args:
        name: of the parameter in its stages.
        parameter: it stays this object, full or empty.
        stages: that hold it.
        places: modules that hold it, and the name there.
        source: where its values are while it is empty.
    """

    name: str
    parameter: nn.Parameter
    stages: set[int]
    places: list[tuple[nn.Module, str]]
    source: Source | None = None
    filled: bool = True
    _mark: tuple[int, int] | None = None

    def fill(self) -> None:
        """Bring the values to where the empty parameter is."""
        source = self._check_place()
        self.parameter.data = source.gather(self.parameter.device)
        self._mark = self._seen()
        self.filled = True

    def release(self, check: bool = True, moved: bool = False) -> None:
        """Let go of the values.

        Args:
            check: whether they may not have changed.
            moved: whether they may lie elsewhere than they were brought to.

        Raises:
            RuntimeError: they are no longer those that were brought.
        """
        self._check_place()
        start = 1 if moved else 0
        if check and self._mark is not None and self._mark[start:] != self._seen()[start:]:
            raise RuntimeError(
                f"StagedDenoiser: {self.name} must not change in swap mode, but it did: the "
                "change would be lost with the stage. Call set_stage_memory('resident') before "
                "weights are trained, fused or replaced."
            )
        parameter = self.parameter
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        self.filled = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies, in memory or pickled, have their values elsewhere."""
        changed = self.filled and self._mark != self._seen()
        return self.__dict__ | ({} if changed else {"_mark": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._mark is None:
            self._mark = self._seen()

    def _seen(self) -> tuple[int, int]:
        return self.parameter.data_ptr(), self.parameter._version

    def _check_place(self) -> Source:
        moved = any(
            module._parameters.get(leaf) is not self.parameter for module, leaf in self.places
        )
        if moved or self.source is None:
            raise RuntimeError(
                f"StagedDenoiser: {self.name} must stay the parameter that it was in swap mode, "
                "but it was replaced, as offloading layer by layer, quantising or adapters do. "
                "Call set_stage_memory('resident') before that."
            )
        return self.source


def find_slots(stages: Sequence[nn.Module]) -> list[Slot]:
    """List the parameters that not all stages hold, in the order of the stages and modules."""
    slots: dict[int, Slot] = {}
    for k, stage in enumerate(stages):
        for prefix, module in stage.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = f"{prefix}.{leaf}" if prefix else leaf
                slot = slots.setdefault(id(parameter), Slot(name, parameter, set(), []))
                slot.stages.add(k)
                if not any(module is other and leaf == known for other, known in slot.places):
                    slot.places.append((module, leaf))
    return [slot for slot in slots.values() if len(slot.stages) < len(stages)]


def shelve(
    slots: Sequence[Slot],
    surgeon: Surgeon,
    kept: Sequence[Mapping[str, torch.Tensor]],
    unions: Mapping[str, bool] | None = None,
) -> Iterator[list[Slot]]:
    """Give every slot its source; yields those of one parameter after the other.

    Args: as of `fill_shelves`.
    """
    named: dict[str, list[Slot]] = {}
    for slot in slots:
        named.setdefault(slot.name, []).append(slot)
    held = {
        name: [(min(slot.stages), slot.parameter) for slot in group]
        for name, group in named.items()
    }
    for name, sources in fill_shelves(surgeon, kept, held, unions):
        for slot, source in zip(named[name], sources, strict=True):
            slot.source = source
        yield named[name]


class StageSwap:
    """Hold the stages' own parameters on the host, and one stage's on the device.

    Args:
        stages: all on one device; the first becomes the one there.
        surgeon: of the denoiser and its layers.
        kept: for each stage, groups of every layer that is not whole.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        surgeon: Surgeon,
        kept: Sequence[Mapping[str, torch.Tensor]],
    ) -> None:
        self.active: int | None = None
        #: Whether others gave the weights other memory, with the same values.
        self.rejoined = False
        self._gathered = False
        self.slots = find_slots(stages)
        for group in shelve(self.slots, surgeon, kept):
            for slot in group:
                slot.release(check=False)
        self._settle()
        self.activate(0)

    @property
    def shelves(self) -> list[Shelf]:
        """The tensors of the bank, each once."""
        found = {id(s.source.shelf): s.source.shelf for s in self.slots if s.source is not None}
        return list(found.values())

    @torch.no_grad()
    def activate(self, stage: int | None) -> None:
        """Let one stage's parameters be there and no other's; None empties all.

        What the stage before holds goes first, so that the two are never there together.

        Raises:
            RuntimeError: values were changed or parameters replaced meanwhile.
        """
        if stage == self.active:
            return
        with torch.inference_mode(False):  # what is made in it could not be used outside
            self.active = None
            for slot in self.slots:
                if slot.filled and stage not in slot.stages:
                    slot.release(moved=self.rejoined)
            for slot in self.slots:
                if not slot.filled and stage in slot.stages:
                    slot.fill()
        self.active = stage

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Leave the device to what is shared while all is moved or cast; the bank follows."""
        active = self.active
        self.activate(None)
        try:
            yield
        finally:
            self._settle()
            self.activate(active)

    @contextmanager
    def shapes(self) -> Iterator[None]:
        """Let empty parameters have their shape, and one number behind it: for counting only."""
        empty = [slot for slot in self.slots if not slot.filled]
        for slot in empty:
            one = slot.parameter.data.new_zeros(())
            if slot.source is not None:
                slot.parameter.data = one.expand(slot.source.shape)
        try:
            yield
        finally:
            for slot in empty:
                slot.release(check=False)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Let every stage hold its values, those of inactive ones on the host: for saving."""
        if self._gathered:  # already, further out
            yield
            return
        empty = [slot for slot in self.slots if not slot.filled]
        places = [slot.parameter.device for slot in empty]
        self._gathered = True
        try:
            for slot in empty:
                if slot.source is not None:
                    slot.parameter.data = slot.source.gather(torch.device("cpu"))
            yield
        finally:
            self._gathered = False
            for slot, device in zip(empty, places, strict=True):
                slot.parameter.data = torch.empty(0, dtype=slot.parameter.dtype, device=device)

    def dissolve(self) -> None:
        """Give every stage its own parameters on the device; the bank is empty then."""
        users = Counter(id(slot.source.shelf) for slot in self.slots if slot.source is not None)
        for slot in self.slots:
            if not slot.filled:  # the others keep what they hold, changed or not
                slot.fill()
            # On the host, what was not gathered is the bank's own tensor, perhaps of several.
            if slot.source is not None and users[id(slot.source.shelf)] > 1:
                if slot.parameter.data_ptr() == slot.source.shelf.tensor.data_ptr():
                    slot.parameter.data = slot.parameter.data.clone()
            slot.source = None
        self.slots = []

    def _settle(self) -> None:
        """Cast the bank to its parameters' types; page-locked where they are on a GPU."""
        for slot in self.slots:
            if slot.source is not None:
                parameter = slot.parameter
                slot.source.shelf.cast(parameter.dtype, parameter.device.type == "cuda")
