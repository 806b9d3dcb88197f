"""DeepCache on a pruned U-Net: one helper a stage, each with features of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model_checks import check_not_optimized
from ..runtime import StagedDenoiser
from .hindrances import check_resident
from .own_modules import OwnModules


class _View:
    """One stage as the package wants a pipeline: a U-Net and a scheduler."""

    def __init__(self, pipe: Any, unet: nn.Module) -> None:
        self._pipe, self.unet = pipe, unet

    @property
    def scheduler(self) -> Any:
        return self._pipe.scheduler


class DeepCacheHelper:
    """Use as `DeepCacheSDHelper` of the package DeepCache, on a pipeline with a pruned U-Net.

    The first step of every stage is computed in full, and the interval counts from there.

    Args:
        pipe: a Stable Diffusion or SDXL pipeline whose U-Net is pruned.

    Raises:
        ValueError: its U-Net is not pruned, or there is none.
        RuntimeError: the package is not installed.
    """

    def __init__(self, pipe: Any) -> None:
        unet = getattr(pipe, "unet", None)
        if not isinstance(unet, StagedDenoiser):
            raise ValueError(
                f"DeepCacheHelper: pipe.unet must be pruned, got {type(unet).__name__}. A dense "
                "U-Net takes the package's own DeepCacheSDHelper; transformers take enable_cache."
            )
        try:
            from DeepCache import DeepCacheSDHelper
        except ImportError as error:
            raise RuntimeError(
                f"DeepCacheHelper: DeepCache must be installed, but: {error}. "
                "pip install mosaicdiff[compose]"
            ) from None
        self._unet = unet
        self._stages = list(unet.stage_models)
        self._helpers = [DeepCacheSDHelper(pipe=_View(pipe, stage)) for stage in self._stages]
        self._own: OwnModules | None = None
        self.set_params()

    def set_params(
        self, cache_interval: int = 1, cache_branch_id: int = 0, skip_mode: str = "uniform"
    ) -> None:
        """Choose how often the deep blocks are computed, and which count as deep.

        Args:
            cache_interval: steps from one full computation to the next.
            cache_branch_id: of the skip connection above which all is computed; 0 is the first.
            skip_mode: `uniform`.

        Raises:
            ValueError: the interval is none.
        """
        if cache_interval < 1:
            raise ValueError(
                f"DeepCacheHelper: cache_interval must be at least 1, got {cache_interval}."
            )
        for helper in self._helpers:
            helper.set_params(cache_interval, cache_branch_id, skip_mode)

    def enable(self) -> None:
        """Switch it on in every stage.

        Raises:
            ValueError: it is on, or the U-Net is optimized or swapped.
        """
        if self._own is not None:
            raise ValueError("DeepCacheHelper: it must be off, but is on. Call disable() first.")
        check_not_optimized(self._unet, "DeepCacheHelper")
        check_resident(self._unet, "DeepCacheHelper")
        self._own = OwnModules(self._stages)
        for helper in self._helpers:
            helper.enable()
        self._own.keep_where(lambda module: "forward" in module.__dict__)
        self._unet._on_entry += (self._enter,)

    def disable(self) -> None:
        """Switch it off in every stage, which are as before.

        Raises:
            ValueError: it is not on.
        """
        if self._own is None:
            raise ValueError("DeepCacheHelper: it must be on, but is off. Call enable() first.")
        for helper, stage in zip(self._helpers, self._stages, strict=True):
            helper.disable()
            for module in stage.modules():
                # Put into the instance by the package, some left behind by it.
                module.__dict__.pop("forward", None)
        self._own.restore()
        self._own = None
        kept = tuple(x for x in self._unet._on_entry if x != self._enter)
        self._unet._on_entry = kept
        self._unet._entered = None

    def _enter(self, stage: int) -> None:
        """Begin a stage without features of another, or of another picture."""
        self._helpers[stage].start_timestep = None
        self._helpers[stage].cached_output.clear()
