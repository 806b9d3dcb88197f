"""The interface of an adapter: what the engine asks of a family of denoisers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..groups import Denoiser, Macs, PrunableLayer, WeightTarget
from ..pack import StageBuilder
from .inputs import Condition


class Adapter(ABC):
    """Say, for one family of denoisers, what may be removed and how it is called."""

    #: Class name of the denoiser in diffusers.
    denoiser_class: str
    #: One line on what is pruned, for people.
    summary: str = ""
    #: What is left whole and why: pattern of module names, and the reason.
    leaves: tuple[tuple[str, str], ...] = ()
    #: Name and position of the forward argument that holds the timestep.
    timestep_argument: tuple[str, int]
    #: Whether image and text are attended to together: then both ends stay whole by default.
    joint: bool = False
    #: What the denoiser is given as a timestep over sigma; None where it is given train timesteps.
    sigma_scale: float | None = None
    #: Whether its pipelines pass sigmas linspace(1, 1/N, N) to `set_timesteps`.
    passes_sigmas: bool = False
    #: Whether a shift that depends on the resolution follows FLUX.2's fit to tokens and steps.
    empirical_shift: bool = False
    #: What the denoiser is conditioned on, beside latents and timestep.
    conditions: tuple[Condition, ...] = ()
    #: Whether latents of any size fit: a file of them is then held to their channels alone.
    any_size: bool = False
    #: Class names of the pipelines that carry this denoiser.
    pipelines: tuple[str, ...] = ()
    #: What its norms of queries and keys are taken over, and what becomes of them, for people.
    norms: str = ""
    #: Class names of the attention processors that are understood.
    processors: tuple[str, ...] = ()
    #: Whether key and value heads may be fewer than query heads.
    grouped_kv: bool = False
    #: Patterns of modules that may be copies of each other: what is equal is held once.
    repeats: tuple[str, ...] = ()
    #: Whether what dropping layers and blocks changes of the stream can be measured.
    watches_blocks: bool = False

    @property
    @abstractmethod
    def float32_modules(self) -> frozenset[str]:
        """Parts of names of what diffusers keeps in float32 in a model of half precision."""

    @abstractmethod
    def empty(self, config: dict[str, Any]) -> Denoiser:
        """Make the dense denoiser with its parameters on the meta device (buffers are real)."""

    @abstractmethod
    def check(self, denoiser: Denoiser) -> None:
        """Raise ValueError where the denoiser is in a state that cannot be pruned exactly."""

    @abstractmethod
    def layers(self, denoiser: Denoiser, shared_norms: str = "exact") -> tuple[PrunableLayer, ...]:
        """List what may be removed, in network order.

        Args:
            denoiser: dense.
            shared_norms: what becomes of norms across all heads: `exact` or `approximate`.
        """

    @abstractmethod
    def targets(self, denoiser: Denoiser) -> tuple[WeightTarget, ...]:
        """List the linears of the blocks, in network order; those that share an input adjoin."""

    @abstractmethod
    def blocks(self, denoiser: Denoiser) -> tuple[str, ...]:
        """Name the blocks, in network order."""

    def stand_in(
        self, stage: Denoiser, layer: PrunableLayer, biases: Sequence[torch.Tensor | None]
    ) -> nn.Module | None:
        """Return what stands for a layer without groups; None where its modules do without."""
        return None

    def finish(self, builder: StageBuilder, layer: PrunableLayer, kept: torch.Tensor) -> None:  # noqa: B027
        """Change what else a smaller layer needs, beside its linears and attributes."""

    def simplify(self, builder: StageBuilder) -> None:  # noqa: B027 - most families need nothing
        """Replace what the smaller layers of a finished stage have made needless, exactly."""

    @abstractmethod
    def tokens(self, denoiser: Denoiser) -> Mapping[str, int]:
        """Return the tokens of one sample in each stream at the native size, e.g. `image`."""

    @abstractmethod
    def latent_shape(self, denoiser: Denoiser) -> tuple[int, ...]:
        """Return the shape of one sample's latents, native size, as the scheduler steps them."""

    @abstractmethod
    def check_inputs(
        self, denoiser: Denoiser, latents: torch.Tensor, inputs: dict[str, Any]
    ) -> None:
        """Raise ValueError where the conditions of a calibration batch do not fit the denoiser.

        Args:
            latents: as many as the conditions are for; of any size.
        """

    @abstractmethod
    def null_inputs(
        self, denoiser: Denoiser, inputs: dict[str, Any], rows: torch.Tensor
    ) -> dict[str, Any]:
        """Return the conditions, with the null condition in the rows where `rows` is true.

        Raises:
            ValueError: a row is true and the inputs do not say what the null condition is.
        """

    @abstractmethod
    def example_inputs(
        self, denoiser: Denoiser, batch_size: int, device: torch.device
    ) -> dict[str, Any]:
        """Make conditions of the right shapes for latents of the native size, for timing."""

    @abstractmethod
    def conditions_of(self, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Take the conditions out of the named arguments of a denoiser call, a row a sample."""

    @abstractmethod
    def predict(
        self,
        denoiser: Denoiser,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        inputs: dict[str, Any],
    ) -> torch.Tensor:
        """Call the denoiser and return what the scheduler's `step` takes, shaped as latents.

        Args:
            timesteps: (B,) as the scheduler calls them.
            inputs: of a calibration batch; those that are no conditions of a call are left out.
        """

    def watch_block(
        self,
        module: Denoiser,
        name: str,
        add: Callable[[str, torch.Tensor, torch.Tensor], None],
    ) -> AbstractContextManager[Any]:
        """Report, at each call of a block, what its layers and the block add to the stream.

        Args:
            module: the block.
            name: of the block.
            add: called with the name of a layer or block, the stream before it (..., C), and
                what it adds.
        """
        raise ValueError(
            f"prune: depth_rank must be 'curve' for {self.denoiser_class}: what its layers add to "
            "the stream is not measured."
        )

    @abstractmethod
    def macs(self, denoiser: Denoiser) -> Macs:
        """Count the MACs of one call for one sample of the native size, dense or pruned."""
