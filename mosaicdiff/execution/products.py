"""Several linears over one input as one product, without a second copy of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

#: A linear by the module that holds it and its name there.
Place = tuple[nn.Module, str]


class JoinedLinear:
    """Multiply one input by the weights of several linears, one after another, at once.

    The weights become views of one tensor: the same parameters with the same values, in a state
    dict as before, and no byte more. `refresh` notices when somebody gave them other memory (a
    move, a cast, a loaded state) and joins them again.

    Args:
        places: of the linears; their outputs follow one another in this order.
        tied: whether the linears become views. Where another joined linear has them already this
            one holds a copy.
    """

    def __init__(self, places: Sequence[Place], tied: bool = True) -> None:
        #: Owner, name and module of each.
        self.places: list[tuple[nn.Module, str, Any]] = [
            (owner, name, owner._modules[name]) for owner, name in places
        ]
        self._tied = tied
        self._seen: list[int] = []
        #: How often the weights were joined: who captured them compares.
        self.joined = 0
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        for _, name, linear in self.places:
            if type(linear) is not nn.Linear:
                raise ValueError(
                    f"optimize: {name} must be a plain linear, got {type(linear).__name__}. Unload "
                    "adapters and quantise after optimize, or leave this model as it is."
                )

    @property
    def sizes(self) -> list[int]:
        """Rows of each linear."""
        return [linear.out_features for linear in self._linears()]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., sum of sizes)."""
        return functional.linear(x, self.weight, self.bias)  # type: ignore[arg-type]

    def refresh(self) -> bool:
        """Join the weights again if they have other memory than when they were joined.

        Returns:
            Whether they had.
        """
        if self.weight is not None and self._identity() == self._seen:
            return False
        self._join()
        return True

    def release(self) -> None:
        """Let go of the joined tensors; the next `refresh` joins anew."""
        self.weight = self.bias = None
        self._seen = []

    def separate(self) -> None:
        """Give every linear memory of its own again, as before."""
        if self.weight is not None and self._tied and self._identity() == self._seen:
            for linear in self._linears():
                for parameter in linear._parameters.values():
                    if parameter is not None:
                        parameter.data = parameter.data.clone()
        self.release()

    def _linears(self) -> list[nn.Linear]:
        return [linear for *_, linear in self.places]

    def _identity(self) -> list[int]:
        """Where the weights are, and of copies how often they were written to."""
        weights = [linear._parameters["weight"] for linear in self._linears()]
        found = [w.data_ptr() for w in weights]  # type: ignore[union-attr]
        return found if self._tied else found + [w._version for w in weights]  # type: ignore

    def _join(self) -> None:
        linears = self._linears()
        self.joined += 1
        for _, name, linear in self.places:
            _check_plain(name, linear)
        self.weight = self._joined([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears]
        if all(bias is None for bias in biases):
            self.bias = None
        elif any(bias is None for bias in biases):
            zeros = [linear.weight.new_zeros(linear.out_features) for linear in linears]
            pairs = zip(biases, zeros, strict=True)
            self.bias = torch.cat([z if b is None else b.detach() for b, z in pairs])
        else:
            self.bias = self._joined(biases)
        self._seen = self._identity()

    def _joined(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = torch.cat([parameter.detach() for parameter in parameters])
        if self._tied:
            for parameter, part in zip(parameters, whole.split(self.sizes), strict=True):
                parameter.data = part
        return whole


class Joins:
    """Make the joined linears of networks that share weights.

    What is asked for twice is made once. A weight that is in one joined linear already is copied
    into a second.

    Args:
        networks: that run the linears: a dense one, or stages that share modules.
    """

    def __init__(self, networks: Sequence[nn.Module] = ()) -> None:
        self._made: dict[tuple[int, ...], JoinedLinear] = {}
        self._taken: set[int] = set()
        self._shared: dict[Any, Any] = {}
        self._users: dict[int, tuple[int, ...]] = {}
        for number, network in enumerate(networks):
            for parameter in network.parameters():
                self._users[id(parameter)] = (*self._users.get(id(parameter), ()), number)

    def linear(self, places: Sequence[Place]) -> JoinedLinear:
        """Return the joined linear of these places."""
        linears: list[Any] = [owner._modules[name] for owner, name in places]
        key = tuple(id(getattr(linear, "weight", linear)) for linear in linears)
        if key not in self._made:
            tied = self._taken.isdisjoint(key)
            self._made[key] = JoinedLinear(places, tied)
            self._taken.update(key)
        return self._made[key]

    def partition(self, places: Sequence[Place]) -> list[list[int]]:
        """Sort linears by the networks that run them: those of a group may be joined.

        Returns:
            Indices into `places`, in groups.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (owner, name) in enumerate(places):
            linear: Any = owner._modules[name]
            users = self._users.get(id(getattr(linear, "weight", None)), ())
            groups.setdefault(users, []).append(index)
        return list(groups.values())

    def shared(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return what networks share that hold the same modules, made for the first.

        Args:
            key: a name, and the identities of the modules.
        """
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    @property
    def made(self) -> list[JoinedLinear]:
        """All of them."""
        return list(self._made.values())


class EqualModules:
    """Modules with equal parameters, of which one may stand for all.

    Args:
        modules: of one structure.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._parameters = [list(module.parameters()) for module in modules]
        self._seen = self._identity()

    def unchanged(self) -> bool:
        """Tell whether no parameter was written to or replaced since."""
        return self._identity() == self._seen

    def accept(self) -> bool:
        """Compare again after a change; whether they are still equal."""
        first, *others = self._parameters
        same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        if same:
            self._seen = self._identity()
        return same

    def _identity(self) -> list[int]:
        # Of weights: a bias alone is hardly ever changed, and this is asked at every call.
        return [
            number
            for parameters in self._parameters
            for p in parameters
            if p.ndim > 1
            for number in (p.data_ptr(), p._version)
        ]


def group_equal(modules: Sequence[nn.Module]) -> list[list[int]]:
    """Sort modules of one structure into groups with equal parameters, by index."""
    groups: list[list[int]] = []
    for index, module in enumerate(modules):
        for group in groups:
            mine, first = list(module.parameters()), list(modules[group[0]].parameters())
            if len(mine) == len(first) and all(
                a is b or (a.shape == b.shape and torch.equal(a, b))
                for a, b in zip(mine, first, strict=True)
            ):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _check_plain(name: str, linear: nn.Module) -> None:
    """Refuse weights that a hook keeps elsewhere or in another type: they are read directly."""
    weight: torch.Tensor = linear.weight  # type: ignore[assignment]
    hooked = any(
        getattr(linear, table, None)
        for table in ("_hf_hook", "_forward_hooks", "_forward_pre_hooks")
    )
    hooked = hooked or bool(getattr(getattr(linear, "_diffusers_hook", None), "hooks", None))
    plain = type(weight.data) is torch.Tensor and weight.is_floating_point()
    if hooked or not plain or weight.dtype.itemsize < 2:
        what = "it is hooked" if hooked else f"its weight is {type(weight).__name__} {weight.dtype}"
        raise RuntimeError(
            f"optimize: {name} must be a plain linear of 16 or 32 bits, but {what}. Call "
            "mosaicdiff.restore first: fused products read weights directly, past hooks, casting "
            "and quantisation."
        )
