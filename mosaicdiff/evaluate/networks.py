"""Networks whose features pictures are compared in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.error import URLError

import torch

from .. import digits
from .optional import optional_module

#: Of a network's name and its file of weights, as in `inception:weights.pth`.
_SEPARATOR = ":"


@dataclass(frozen=True)
class Features:
    """What a network makes of pictures, float32 on the CPU.

    Args:
        values: (N, d).
        probabilities: (N, K) of classes, or None of a network that knows none.
    """

    values: torch.Tensor
    probabilities: torch.Tensor | None = None


class FeatureNetwork(Protocol):
    """Turn pictures into features; whether it knows classes is its own affair.

    Args:
        name: for people, and in files of features.
        classes: how many it knows whose numbers are the labels that a model is asked for, so that
            it can read them; None where the numbers mean something else.
    """

    name: str
    classes: int | None

    def __call__(self, images: torch.Tensor) -> Features:
        """Return the features of pictures (N, C, H, W) in [-1, 1].

        Raises:
            ValueError: it does not take pictures of that shape.
        """


def to_bytes(images: torch.Tensor, channels: int = 3) -> torch.Tensor:
    """Return pictures (N, C, H, W) in [-1, 1] as uint8; grey ones are repeated into colours.

    Raises:
        ValueError: they have neither 1 nor `channels` channels.
    """
    if images.ndim != 4 or images.shape[1] not in (1, channels):
        raise ValueError(
            f"evaluate: pictures must be (N, {channels}, H, W) or grey (N, 1, H, W), got "
            f"{tuple(images.shape)}."
        )
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.expand(-1, channels, -1, -1).contiguous()


class DigitsNetwork:
    """The committed classifier of digits: 64 features, 10 classes."""

    name = "digits"
    classes: int | None = digits.CLASSES

    def __init__(self) -> None:
        self._classifier = digits.load_classifier()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        expected = (1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
        if images.shape[1:] != expected:
            raise ValueError(
                f"evaluate: pictures must be (N, 1, 32, 32) for the features of digits, got "
                f"{tuple(images.shape)}. Use --features inception."
            )
        values = self._classifier.features(images.float().cpu())
        return Features(values, self._classifier.out(values).softmax(1))


class InceptionNetwork:
    """Inception-v3 as FID is published with: torch-fidelity's, 2048 features, 1008 classes.

    Probabilities are of the logits without bias, as torch-fidelity takes the Inception score. The
    classes' numbers are TensorFlow's, not ImageNet's labels.

    Args:
        weights: file of them; None is torch-fidelity's own, which it downloads.
        device: to run on.

    Raises:
        ValueError: the package is missing, or the weights cannot be had.
    """

    name = "inception"
    classes: int | None = None

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu") -> None:
        what = "--features inception"
        if weights is not None and not weights.is_file():
            raise ValueError(f"evaluate: {what} must name a file of weights, got {weights}.")
        module = optional_module(
            "torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity", what
        )
        wanted = ["2048", "logits_unbiased"]
        path = None if weights is None else str(weights)
        try:
            network = module.FeatureExtractorInceptionV3(
                "mosaicdiff", wanted, feature_extractor_weights_path=path
            )
        except (URLError, OSError, RuntimeError) as error:
            first = str(error).partition("\n")[0]  # the rest are names of all parameters
            raise ValueError(
                f"evaluate: the weights of {what} could not be loaded: {first} Give their file: "
                "--features inception:FILE, of torch-fidelity's release v0.2.0."
            ) from None
        self._network, self._device = network.to(device), torch.device(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        values, logits = self._network(to_bytes(images).to(self._device))
        return Features(values.float().cpu(), logits.float().softmax(1).cpu())


def feature_network(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Return a network by name: `digits`, `inception` or `inception:FILE`.

    Raises:
        ValueError: there is no such network, or what it needs is missing.
    """
    kind, separator, path = name.partition(_SEPARATOR)
    if kind == "digits" and not separator:
        return DigitsNetwork()
    if kind == "inception" and bool(separator) == bool(path):
        return InceptionNetwork(Path(path) if path else None, device)
    raise ValueError(f"--features must be digits, inception, inception:FILE or none, got {name!r}.")


def extract(network: FeatureNetwork, images: torch.Tensor, batch_size: int = 64) -> Features:
    """Return the features of pictures (N, C, H, W) in [-1, 1], a batch at a time."""
    parts = [network(batch) for batch in images.split(batch_size)]
    return join(parts)


def join(parts: list[Features]) -> Features:
    """Put features of batches together."""
    found: list[Any] = [part.probabilities for part in parts]
    return Features(
        torch.cat([part.values for part in parts]),
        None if found[0] is None else torch.cat(found),
    )
