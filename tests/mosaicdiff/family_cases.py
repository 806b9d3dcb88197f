"""Tiny denoisers of every family, each with a batch that it can be called with."""

import torch

from . import cases_a, cases_b
from .conftest import tiny_denoiser, tiny_sd3, tiny_sd3_batches
from .family_case import FamilyCase


def _dit() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    latents = torch.randn(2, 2, 8, 8, generator=torch.manual_seed(5))
    return latents, torch.tensor([640, 640]), {"class_labels": torch.tensor([1, 3])}


def _sd3() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    latents = torch.randn(2, 2, 8, 8, generator=torch.manual_seed(5))
    _, inputs = tiny_sd3_batches(2)[0]
    inputs = {k: v for k, v in inputs.items() if not k.startswith("negative_")}
    return latents, torch.full((2,), 640.0), inputs


CASES: dict[str, FamilyCase] = {
    "dit": FamilyCase(tiny_denoiser, _dit),
    "sd3": FamilyCase(lambda: tiny_sd3(dual=(), qk_norm=None), _sd3),
    # diffusers cannot fuse a block with a second attention, cut or not.
    "sd3.5": FamilyCase(tiny_sd3, _sd3, fuses="has no attribute"),
    **cases_a.CASES,
    "pixart-alpha": FamilyCase(
        lambda: cases_b.tiny_pixart(use_additional_conditions=True), cases_b.pixart_alpha_batch
    ),
    "pixart-sigma": FamilyCase(cases_b.tiny_pixart, cases_b.pixart_batch),
    "sd1.5": FamilyCase(cases_b.tiny_unet, cases_b.unet_batch),
    "sdxl": FamilyCase(cases_b.tiny_sdxl, cases_b.sdxl_batch),
    "sana": FamilyCase(cases_b.tiny_sana, cases_b.sana_batch),
    "sana1.5": FamilyCase(
        lambda: cases_b.tiny_sana(qk_norm="rms_norm_across_heads"), cases_b.sana_batch
    ),
    "ltx": FamilyCase(cases_b.tiny_ltx, cases_b.ltx_batch),
    # Norms across heads: their projections stay whole, values do not.
    "wan": FamilyCase(cases_b.tiny_wan, cases_b.wan_batch, fuses="cannot be fused"),
    "wan-picture": FamilyCase(
        cases_b.tiny_wan_picture, cases_b.wan_picture_batch, fuses="cannot be fused"
    ),
}
