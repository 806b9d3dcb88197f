"""The interface of an adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..groups import Denoiser, Macs, PrunableLayer, WeightTarget
from ..pack import Parts, StageBuilder


class Adapter(ABC):
    """Say, for one family of denoisers, what may be removed and how to remove it."""

    #: Class name of the denoiser in diffusers.
    denoiser_class: str
    #: Name and position of the forward argument that holds the timestep.
    timestep_argument: tuple[str, int]
    #: Whether image and text are attended to together: then both ends stay whole by default.
    joint: bool = False
    #: What the denoiser is given as a timestep over sigma; None where it is given train timesteps.
    sigma_scale: float | None = None
    #: What a calibration file calls the inputs of a batch, and those that may be there too.
    condition: dict[str, str]
    optional_condition: dict[str, str] = {}

    @abstractmethod
    def empty(self, config: dict[str, Any]) -> Denoiser:
        """Make the dense denoiser with its parameters on the meta device (buffers are real)."""

    @abstractmethod
    def check(self, denoiser: Denoiser) -> None:
        """Raise ValueError where the denoiser is in a state that cannot be pruned exactly."""

    @abstractmethod
    def layers(self, denoiser: Denoiser) -> tuple[PrunableLayer, ...]:
        """List what may be removed, in network order."""

    @abstractmethod
    def targets(self, denoiser: Denoiser) -> tuple[WeightTarget, ...]:
        """List the linears of the blocks, in network order; those that share an input adjoin."""

    @abstractmethod
    def blocks(self, denoiser: Denoiser) -> tuple[str, ...]:
        """Name the blocks, in network order."""

    @abstractmethod
    def replace(
        self, builder: StageBuilder, layer: PrunableLayer, parts: Parts, groups: int
    ) -> None:
        """Put the smaller layer made of `parts`, `groups` groups wide, into a stage."""

    def simplify(self, builder: StageBuilder) -> None:  # noqa: B027 - most families need nothing
        """Replace what the smaller layers of a finished stage have made needless, exactly."""

    @abstractmethod
    def parts(self, stage: Denoiser, layer: PrunableLayer) -> Parts:
        """Collect a layer's tensors from a stage; the inverse of `replace`."""

    @abstractmethod
    def latent_shape(self, denoiser: Denoiser) -> tuple[int, int, int]:
        """Return (channels, height, width) of the latents the denoiser was made for."""

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
        """Return the forward arguments, with the null condition in the rows where `rows` is true.

        Raises:
            ValueError: a row is true and the inputs do not say what the null condition is.
        """

    @abstractmethod
    def example_inputs(
        self, denoiser: Denoiser, batch_size: int, device: torch.device
    ) -> dict[str, Any]:
        """Make condition inputs of the right shapes, for timing."""

    @abstractmethod
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
            inputs: of a calibration batch; those that are no forward arguments are left out.
        """

    @abstractmethod
    def macs(self, denoiser: Denoiser) -> Macs:
        """Count the MACs of one call for one sample, dense or pruned."""
