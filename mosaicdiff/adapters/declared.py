"""What a declaration of blocks and conditions gives an adapter; a family adds what is its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..groups import Denoiser, Macs, PrunableLayer, WeightTarget, leading_parameter, shared_input
from ..model_checks import check_shapes, check_state
from ..pack import BiasOnly
from .base import Adapter
from .common import check_plain
from .family import Blocks
from .inputs import Condition, check_conditions, example_conditions, with_null
from .joint import NoHeads, joint_stand_in
from .macs import count_macs


class Family(Adapter):
    """An adapter from a declaration.

    A family says in `block_kinds` what its blocks are, by `tokens` how much goes through them, in
    `conditions` what it is called with; it overrides what is not usual.
    """

    block_kinds: tuple[Blocks, ...]
    #: Names in the block of attentions of image and text together.
    joint_layers: tuple[str, ...] = ()

    @property
    def float32_modules(self) -> frozenset[str]:
        import diffusers

        names = getattr(diffusers, self.denoiser_class)._keep_in_fp32_modules
        return frozenset([names] if isinstance(names, str) else names or ())

    def empty(self, config: dict[str, Any]) -> Denoiser:
        import diffusers
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            return getattr(diffusers, self.denoiser_class).from_config(config)

    def check(self, denoiser: Denoiser) -> None:
        check_state(denoiser, self.processors, self.grouped_kv)
        check_plain(denoiser, self.layers(denoiser))
        check_shapes(denoiser, self.empty(dict(denoiser.config)).state_dict())

    def layers(self, denoiser: Denoiser, shared_norms: str = "exact") -> tuple[PrunableLayer, ...]:
        found: list[PrunableLayer] = []
        for kind in self.block_kinds:
            for name in kind.names(denoiser):
                tokens = self.block_tokens(denoiser, name)
                found += kind.layers_of(denoiser, name, tokens, shared_norms)
        return tuple(found)

    def block_tokens(self, denoiser: Denoiser, block: str) -> Mapping[str, int]:
        """Return the tokens of each stream in a block."""
        return self.tokens(denoiser)

    def blocks(self, denoiser: Denoiser) -> tuple[str, ...]:
        return tuple(name for kind in self.block_kinds for name in kind.names(denoiser))

    def targets(self, denoiser: Denoiser) -> tuple[WeightTarget, ...]:
        """List linears by what they are given; a packed one once."""
        found: dict[str, WeightTarget] = {}
        for kind in self.block_kinds:
            for block in kind.names(denoiser):
                for group in _shared_inputs(kind, denoiser, block):
                    names = [name for name in group if name not in found]
                    for target in shared_input(*names) if names else ():
                        found[target.name] = target
        return tuple(found.values())

    def latent_shape(self, denoiser: Denoiser) -> tuple[int, ...]:
        """Return a square of the configuration's size, as image models state it."""
        config = denoiser.config
        return config.in_channels, config.sample_size, config.sample_size

    def stand_in(
        self, stage: Denoiser, layer: PrunableLayer, biases: Sequence[torch.Tensor | None]
    ) -> nn.Module | None:
        """Return what is left of a layer that has a module of its own."""
        if layer.module:
            return None
        if layer.readers[0].stop is not None:  # heads that are read beside a block's neurons
            inside = layer.readers[0].module.startswith(f"{layer.home}.")
            return None if inside else NoHeads()
        if layer.name.rpartition(".")[2] in self.joint_layers:
            return joint_stand_in(stage, layer, biases)
        reader = stage.get_submodule(layer.readers[0].module)
        return BiasOnly(reader.weight.shape[0], biases[0])

    def conditions_for(self, denoiser: Denoiser) -> tuple[Condition, ...]:
        """Return the conditions of one configuration, where that decides what it is called with."""
        return self.conditions

    def check_inputs(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: dict[str, Any]
    ) -> None:
        conditions = self.conditions_for(denoiser)
        check_conditions(denoiser, conditions, len(latents), inputs, self.denoiser_class)

    def null_inputs(
        self, denoiser: Denoiser, inputs: dict[str, Any], rows: torch.Tensor
    ) -> dict[str, Any]:
        return with_null(self.conditions_for(denoiser), inputs, rows)

    def example_inputs(
        self, denoiser: Denoiser, batch_size: int, device: torch.device
    ) -> dict[str, Any]:
        conditions, sizes = self.conditions_for(denoiser), self.example_sizes(denoiser)
        return example_conditions(denoiser, conditions, sizes, batch_size, device)

    def example_sizes(self, denoiser: Denoiser) -> Mapping[str, int]:
        """Return the sizes that conditions leave open, at the native size: tokens, and others."""
        return self.tokens(denoiser)

    def conditions_of(self, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        latents = next(value for name, value in arguments.items() if name != "self")
        values = ((c, c.find(arguments)) for c in self.conditions)
        return {c.name: c.rows(value, len(latents)) for c, value in values if value is not None}

    def predict(
        self,
        denoiser: Denoiser,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        inputs: dict[str, Any],
    ) -> torch.Tensor:
        arguments = self.arguments(denoiser, latents, inputs)
        given = self.given_timesteps(denoiser, timesteps, latents)
        arguments[self.timestep_argument[0]] = given
        output = denoiser(latents, **arguments).sample
        # Some predict a variance beside; it comes after.
        return output[:, : latents.shape[1]] if output.shape != latents.shape else output

    def arguments(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of a call beside latents and timestep."""
        found: dict[str, Any] = {}
        for condition in self.conditions:
            if condition.name in inputs and condition.taken(denoiser):
                value = inputs[condition.name]
                # What is the same for all rows are positions and numbers, which stay exact.
                if not condition.per_call and value.is_floating_point():
                    value = value.to(latents.dtype)
                condition.put(found, value)
        return found

    def given_timesteps(
        self, denoiser: Denoiser, timesteps: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        """Return what the denoiser is given for timesteps (B,) as the scheduler calls them."""
        return timesteps

    def macs(self, denoiser: Denoiser) -> Macs:
        def call(copy: Denoiser, device: torch.device) -> None:
            dtype = leading_parameter(denoiser).dtype
            latents = torch.zeros(1, *self.latent_shape(denoiser), device=device, dtype=dtype)
            timesteps = torch.zeros(1, device=device)
            inputs = self.example_inputs(copy, 1, device)
            for condition in self.conditions_for(copy):  # nothing can be read on that device
                if condition.number is not None and condition.name in inputs:
                    inputs[condition.name] = condition.number(condition.example)
            self.predict(copy, latents, timesteps, inputs)

        sizes = self.latent_shape(denoiser), tuple(self.example_sizes(denoiser).items())
        return count_macs(denoiser, call, sizes)


def _shared_inputs(kind: Blocks, denoiser: Denoiser, block: str) -> list[list[str]]:
    """List the linears of a block's layers, those that share an input together, in order."""
    found: list[list[str]] = []
    for spec in kind.layers:
        readers = [(name,) for _, name in spec.read]
        for names in (*(names for _, names in spec.written), *readers):
            paths = [spec.path(name) for name in names]
            held = [f"{block}.{p}" for p in paths if _is_linear(denoiser, f"{block}.{p}")]
            if held:
                found.append(held)
    return found


def _is_linear(denoiser: Denoiser, name: str) -> bool:
    try:
        return isinstance(denoiser.get_submodule(name), nn.Linear)
    except AttributeError:
        return False
