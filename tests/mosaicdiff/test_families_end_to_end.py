"""Every family through the public API: pruned, in packages, by single weights, saved and loaded."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from mosaicdiff import PruneConfig, StagedDenoiser, prune
from mosaicdiff.adapters import adapter_for

from . import cases_b
from .conftest import linear_scheduler

pytestmark = pytest.mark.models

#: Fresh denoisers and batches of so many rows.
FAMILIES = {
    "pixart-alpha": (
        lambda: cases_b.tiny_pixart(use_additional_conditions=True), cases_b.pixart_alpha_batch
    ),
    "sdxl": (cases_b.tiny_sdxl, cases_b.sdxl_batch),
    "wan-picture": (cases_b.tiny_wan_picture, cases_b.wan_picture_batch),
    "sana1.5": (
        lambda: cases_b.tiny_sana(qk_norm="rms_norm_across_heads"), cases_b.sana_batch
    ),
    "ltx": (cases_b.tiny_ltx, cases_b.ltx_batch),
}  # fmt: skip

SMALL = {
    "samples": 8, "batch_size": 8, "steps": 4, "null_share": 0.0, "probe_samples": 2, "stages": 2,
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request):
    make, batch = FAMILIES[request.param]
    return make(), batch


def scheduler_of(denoiser):
    if adapter_for(denoiser).sigma_scale is None:
        return linear_scheduler(DDIMScheduler)
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def pruned(family, **options):
    denoiser, batch = family
    latents, _, inputs = batch(8)
    return prune(
        denoiser,
        PruneConfig(**SMALL | options),
        scheduler=scheduler_of(denoiser),
        calibration=[(latents, inputs)],
    )


def outputs(staged, batch):
    latents, timesteps, inputs = batch(2)
    with torch.no_grad():
        return [staged.adapter.predict(m, latents, timesteps, inputs) for m in staged.stage_models]


def assert_survives_saving(staged, batch, folder):
    staged.save_pretrained(folder)
    loaded = StagedDenoiser.from_pretrained(folder)
    for mine, theirs in zip(outputs(staged, batch), outputs(loaded, batch), strict=True):
        assert torch.isfinite(mine).all()
        assert torch.equal(mine, theirs)


def test_pruned_by_the_public_api(family, tmp_path):
    before = copy.deepcopy(family[0].state_dict())
    result = pruned(family, sparsity=0.3)
    report = result.report
    assert report.sparsity == pytest.approx(0.3, abs=0.03)
    assert report.macs_with_attention < 0.95 * report.macs_dense_with_attention
    assert report.parameters_per_step < report.parameters_dense
    assert all(torch.equal(before[name], value) for name, value in family[0].state_dict().items())
    assert_survives_saving(result.denoiser, family[1], tmp_path / "m")


def test_pruned_in_two_packages(family, tmp_path):
    result = pruned(family, sparsity=0.3, packages=2, allocation="uniform")
    assert result.report.packages.count == 2
    assert result.report.sparsity == pytest.approx(0.3, abs=0.05)
    assert_survives_saving(result.denoiser, family[1], tmp_path / "m")


@pytest.mark.parametrize("granularity", ["unstructured", "2:4"])
def test_single_weights(family, granularity, tmp_path):
    options = {"sparsity": 0.5} if granularity == "unstructured" else {}
    staged = pruned(family, granularity=granularity, stages=1, **options).denoiser
    masks = staged.masks[0]
    assert set(masks) == {target.name for target in staged.adapter.targets(family[0])}
    for name, mask in masks.items():
        weight = staged.stage_models[0].get_submodule(name).weight
        assert not weight[~mask].any()
        if granularity == "2:4":
            assert bool((mask.unflatten(1, (-1, 4)).sum(2) == 2).all())
    removed = sum(int((~mask).sum()) for mask in masks.values())
    assert removed == pytest.approx(0.5 * sum(m.numel() for m in masks.values()), rel=0.01)
    assert_survives_saving(staged, family[1], tmp_path / "m")
