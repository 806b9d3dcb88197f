"""Convolutions of one pixel as readers (Sana): what is summed over pixels, and the refit of it."""

import pytest
import torch

from mosaicdiff import PruneConfig, calibrate, prune

from . import cases_b
from .conftest import flow_scheduler
from .test_families_end_to_end import SMALL

pytestmark = pytest.mark.models

LAYER = "transformer_blocks.0.ff"
CONFIG = PruneConfig(**SMALL | {"stages": 1, "allocation": "uniform", "sparsity": 0.3})


def calibrated(denoiser):
    """A calibration, its batches, and what the reader was given on the way, (pixels, channels)."""
    latents, _, inputs = cases_b.sana_batch(8)
    batches, seen = [(latents, inputs)], []
    reader = denoiser.get_submodule(f"{LAYER}.conv_point")
    hook = reader.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    measured = calibrate(denoiser, CONFIG, scheduler=flow_scheduler(), calibration=batches)
    hook.remove()
    return measured, batches, torch.cat(seen).permute(0, 2, 3, 1).flatten(0, 2).double()


def test_statistics_are_of_the_pixels():
    measured, _, pixels = calibrated(cases_b.tiny_sana())
    held = measured.statistics[0][f"{LAYER}.conv_point"].unpack(torch.device("cpu"))
    assert held.weight == len(pixels) == 8 * 6 * 6
    torch.testing.assert_close(held.hessian, (pixels.T @ pixels / len(pixels)).float())
    torch.testing.assert_close(held.mean, pixels.mean(0).float())


def test_the_refit_is_least_squares():
    denoiser = cases_b.tiny_sana()
    measured, batches, pixels = calibrated(denoiser)
    staged = prune(
        denoiser, CONFIG, scheduler=flow_scheduler(), calibration=batches, measured=measured
    ).denoiser
    kept = staged.info.kept[0][LAYER]
    dense = denoiser.get_submodule(LAYER)
    hidden = dense.conv_point.in_channels
    assert 0 < len(kept) < hidden
    hessian = pixels.T @ pixels / len(pixels)
    hessian += CONFIG.damping * hessian.diagonal().mean() * torch.eye(hidden)
    weight = dense.conv_point.weight.flatten(1).double()
    expected = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight.T).T
    mine = staged.stage_models[0].get_submodule(LAYER)
    torch.testing.assert_close(
        mine.conv_point.weight.flatten(1).double(), expected, rtol=1e-4, atol=1e-5
    )
    rows = torch.cat([kept, kept + hidden])  # before the gate, and the gate
    assert torch.equal(mine.conv_inverted.weight, dense.conv_inverted.weight[rows])
    assert torch.equal(mine.conv_depth.weight, dense.conv_depth.weight[rows])
    assert mine.conv_depth.groups == 2 * len(kept)


def test_affine_compensation_gives_the_reader_a_bias():
    denoiser = cases_b.tiny_sana()
    measured, batches, pixels = calibrated(denoiser)
    config = PruneConfig(**CONFIG.to_dict() | {"compensation": "affine"})
    staged = prune(
        denoiser, config, scheduler=flow_scheduler(), calibration=batches, measured=measured
    ).denoiser
    kept = staged.info.kept[0][LAYER]
    reader = staged.stage_models[0].get_submodule(f"{LAYER}.conv_point")
    change = denoiser.get_submodule(f"{LAYER}.conv_point").weight.flatten(1).double().clone()
    change[:, kept] -= reader.weight.flatten(1).double()
    torch.testing.assert_close(reader.bias.double(), change @ pixels.mean(0), rtol=1e-4, atol=1e-5)
