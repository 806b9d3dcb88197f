"""Scores of single pictures by other packages: against a prompt, or against another picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from .evaluation import Metric
from .networks import to_bytes
from .optional import optional_module


class PromptScore(Protocol):
    """Say how well pictures show what was asked for."""

    metric: Metric

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> float:
        """Return the mean over pictures (N, C, H, W) in [-1, 1], with a prompt each."""


def pil_images(images: torch.Tensor) -> list[Image.Image]:
    """Return pictures (N, C, H, W) in [-1, 1] in colour."""
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in to_bytes(images.cpu())]


class ClipScore:
    """The mean of 100 max(cos(picture, prompt), 0) in a CLIP model's features.

    Args:
        model: Hub id or folder of the model with its processor.
        device: to run on.

    Raises:
        ValueError: the package, or the model, is missing.

    Source: Hessel et al., "CLIPScore" (arXiv 2104.08718), with 100 in the place of 2.5.
    """

    def __init__(self, model: str, device: torch.device | str = "cpu") -> None:
        transformers = optional_module("transformers", "transformers", "--clip-score")
        try:
            clip: Any = transformers.CLIPModel.from_pretrained(model)
            self._tokenizer = transformers.CLIPTokenizer.from_pretrained(model)
            self._processor = transformers.CLIPImageProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"evaluate: --clip-score must be a CLIP model (Hub id, e.g. "
                f"openai/clip-vit-large-patch14, or folder), got {model!r}: {error}"
            ) from None
        self._clip, self._device = clip.to(device).eval(), torch.device(device)
        self.metric = Metric("clip_score", "CLIP score", "higher", "condition", model)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> float:
        pixels = self._processor(images=pil_images(images), return_tensors="pt").pixel_values
        words = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self._clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        output = self._clip(pixel_values=pixels.to(self._device), **words)
        # The model normalises both; the diagonal are the pictures' own prompts.
        likeness = (output.image_embeds * output.text_embeds).sum(1).double()
        return float(100 * likeness.clamp_min(0).mean())


class ImageRewardScore:
    """The mean of ImageReward-v1.0, the package's own, which downloads its weights.

    Raises:
        ValueError: the package, or the model, is missing.

    Source: Xu et al., "ImageReward" (arXiv 2304.05977).
    """

    metric = Metric("image_reward", "ImageReward", "higher", "condition", "ImageReward-v1.0")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        package = optional_module("ImageReward", "image-reward", "--image-reward")
        try:
            self._model = package.load(self.metric.network, device=device)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"evaluate: the weights of --image-reward could not be loaded: {error}"
            ) from None

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> float:
        pairs = zip(prompts, pil_images(images), strict=True)
        scores = [float(self._model.score(prompt, picture)) for prompt, picture in pairs]
        return sum(scores) / len(scores)


class Lpips:
    """The learned distance of pictures to those of the dense model, of the package lpips.

    Args:
        net: `alex`, `vgg` or `squeeze`; torchvision downloads its weights.
        device: to run on.
        model: made already, in the place of the pretrained one.

    Raises:
        ValueError: the package, or the weights, are missing.

    Source: Zhang et al., "The unreasonable effectiveness of deep features" (arXiv 1801.03924).
    """

    def __init__(
        self, net: str = "alex", device: torch.device | str = "cpu", model: Any = None
    ) -> None:
        if model is None:
            package = optional_module("lpips", "lpips", "--lpips")
            try:
                model = package.LPIPS(net=net, verbose=False)
            except (OSError, RuntimeError) as error:
                raise ValueError(
                    f"evaluate: the weights of --lpips {net} could not be loaded: {error}"
                ) from None
        self._model, self._device = model.to(device).eval(), torch.device(device)
        self.metric = Metric("lpips", "LPIPS to dense", "lower", "dense", net)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, others: torch.Tensor) -> float:
        """Return the mean over pictures (N, C, H, W) in [-1, 1]; grey ones become coloured."""
        a, b = (x.float().expand(-1, 3, -1, -1).to(self._device) for x in (images, others))
        return float(self._model(a, b).double().mean())
