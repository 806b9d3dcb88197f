"""Give every stage module objects of its own, around the same parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..pack import shallow_clone

#: Where diffusers and accelerate keep what they hang on a module.
_HOOKED = ("_diffusers_hook", "_hf_hook")


class OwnModules:
    """Module objects that stages no longer share, and the way back.

    What hooks a module (a cache, DeepCache) must not see two stages through one object: each
    stage gets clones of what it shared, around the same parameters, so that no memory is added.

    Args:
        stages: of one denoiser; their containers are changed in place.

    Raises:
        ValueError: a shared container is hooked already; its hooks cannot be divided.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        counts = Counter(id(m) for stage in stages for m in stage.modules())
        self._shared = {key for key, count in counts.items() if count > 1}
        self._check(stages)
        #: Containers, names in them, and what was there.
        self._before: list[tuple[nn.Module, str, nn.Module]] = []
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        for stage in stages:
            self._divide(stage, {})

    def keep_where(self, hooked: Callable[[nn.Module], bool]) -> None:
        """Share again what nothing was hung on, down to the last linear.

        So that what is done to linears later, casting or quantising, is done once for all stages.
        """
        originals = {id(clone): original for clone, original in self._pairs}
        kept = []
        for owner, name, original in self._before:
            if self._keep(owner, name, originals, hooked):
                kept.append((owner, name, original))
        self._before = kept
        used = {id(m) for owner, name, _ in kept for m in owner._modules[name].modules()}  # type: ignore[union-attr]
        self._pairs = [(c, o) for c, o in self._pairs if id(c) in used]

    def _keep(
        self,
        owner: nn.Module,
        name: str,
        originals: dict[int, nn.Module],
        hooked: Callable[[nn.Module], bool],
    ) -> bool:
        """Put an original back in the place of its clone; return whether the clone stays."""
        clone = owner._modules[name]
        if clone is None or id(clone) not in originals:
            return False
        if not any(hooked(module) for module in clone.modules()):
            owner._modules[name] = originals[id(clone)]
            return False
        for child in list(clone._modules):
            self._keep(clone, child, originals, hooked)
        return True

    def restore(self) -> bool:
        """Put the shared objects back, unless something else was hung on the stages' own since.

        Returns:
            Whether they are back. Where not, the stages keep their own: to the outside no
            difference.
        """
        if not all(_untouched(clone, original) for clone, original in self._pairs):
            return False
        for owner, name, original in self._before:
            owner._modules[name] = original
        return True

    def _check(self, stages: Sequence[nn.Module]) -> None:
        for stage in stages:
            for name, module in stage.named_modules():
                hooked = any(key in module.__dict__ for key in _HOOKED)
                if id(module) in self._shared and hooked and module._modules:
                    raise ValueError(
                        f"StagedDenoiser: {name} must not be hooked yet where stages share it, but "
                        "it is (by offloading?). Enable the cache first and offload afterwards."
                    )

    def _divide(self, owner: nn.Module, clones: dict[int, nn.Module]) -> None:
        for name, child in list(owner._modules.items()):
            if child is None:
                continue
            if id(child) not in self._shared:
                self._divide(child, clones)
                continue
            self._before.append((owner, name, child))
            owner._modules[name] = self._clone(child, clones)

    def _clone(self, module: nn.Module, clones: dict[int, nn.Module]) -> nn.Module:
        """Clone a module with all that is in it; one that is there twice is cloned once."""
        if any(key in module.__dict__ for key in _HOOKED):
            return module  # a leaf that is cast or moved around its call: that is for all stages
        if id(module) not in clones:
            clone: Any = shallow_clone(module)
            clones[id(module)] = clone
            self._pairs.append((clone, module))
            for name, child in clone._modules.items():
                if child is not None:
                    clone._modules[name] = self._clone(child, clones)
        return clones[id(module)]


def _untouched(clone: nn.Module, original: nn.Module) -> bool:
    if any(key in clone.__dict__ for key in _HOOKED):
        return False
    held, before = clone._parameters, original._parameters
    return held.keys() == before.keys() and all(held[n] is before[n] for n in held)
