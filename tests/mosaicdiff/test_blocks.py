"""Blocks that are dropped whole."""

import torch
from diffusers import DiTPipeline

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.adapters.dit import BiasOnlyBlock

from .conftest import linear_scheduler, sample, tiny_batches, tiny_denoiser

DROPPED = PruneConfig(
    allocation="explicit",
    stage_sparsity=(0.0, 0.0, 0.0),
    layer_sparsity={
        "transformer_blocks.1.attn1": (1.0, 0.0, 1.0),
        "transformer_blocks.1.ff": (1.0, 1.0, 0.0),
    },
    samples=16,
    steps=20,
)


def inputs():
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(3, 2, 8, 8, generator=generator, dtype=torch.float64)
    return {
        "timestep": torch.tensor([990, 991, 992]),
        "class_labels": torch.tensor([1, 5, 1000]),
    }, latents


def zeroed(denoiser, names):
    """The dense denoiser with the readers' columns at zero."""
    for name in names:
        denoiser.get_submodule(name).weight.data.zero_()
    return denoiser


def test_a_dropped_block_is_the_block_with_zeroed_columns():
    dense = tiny_denoiser().double()
    result = mosaicdiff.prune(
        dense, DROPPED, scheduler=linear_scheduler(), calibration=tiny_batches()
    )
    stages = result.denoiser.stage_models
    dropped = [type(stage.transformer_blocks[1]) is BiasOnlyBlock for stage in stages]
    assert dropped == [True, False, False]
    stage = stages[0]
    expected = zeroed(
        dense, ["transformer_blocks.1.attn1.to_out.0", "transformer_blocks.1.ff.net.2"]
    )
    conditions, latents = inputs()
    with torch.no_grad():
        got = stage(latents, **conditions).sample
        torch.testing.assert_close(got, expected(latents, **conditions).sample, rtol=1e-12, atol=0)


def test_a_dropped_block_survives_saving_and_loading(pipe, batches, tmp_path):
    mosaicdiff.prune(pipe, DROPPED, calibration=batches)
    before = sample(pipe)
    pipe.save_pretrained(tmp_path / "out")
    again = DiTPipeline.from_pretrained(tmp_path / "out")
    again.set_progress_bar_config(disable=True)
    assert type(again.transformer.stage_models[0].transformer_blocks[1]) is BiasOnlyBlock
    assert (sample(again) == before).all()


def test_a_dropped_block_compiles_in_one_graph():
    dense = tiny_denoiser()
    staged = mosaicdiff.prune(
        dense, DROPPED, scheduler=linear_scheduler(), calibration=tiny_batches()
    ).denoiser
    block = staged.stage_models[0].transformer_blocks[1]
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    hidden = torch.randn(2, 16, 32)
    conditions = {"timestep": torch.tensor([990, 991]), "class_labels": torch.tensor([1, 2])}
    torch.testing.assert_close(compiled(hidden, **conditions), block(hidden, **conditions))
