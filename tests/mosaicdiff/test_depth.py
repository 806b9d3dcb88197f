"""What whole layers and blocks change, against activations worked out by hand."""

import pytest
import torch

from mosaicdiff import PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.allocation.planning import make_frame
from mosaicdiff.pipeline import calibrate, prune
from mosaicdiff.statistics.depth import measure_changes
from mosaicdiff.statistics.noising import CalibrationSet, draw_noisy

from .conftest import linear_scheduler, tiny_batches, tiny_denoiser

CONFIG = PruneConfig(samples=24, steps=12, batch_size=16)


def by_hand(denoiser, batches):
    """Return the stream before and after every layer and block, all tokens as rows."""
    rows = {}
    for latents, timesteps, inputs in batches:
        streams, called = {}, {}
        handles = []
        for index, block in enumerate(denoiser.transformer_blocks):
            name = f"transformer_blocks.{index}"

            def keep(module, args, kwargs, output, name=name, streams=streams):
                streams[name] = (args[0] if args else kwargs["hidden_states"], output)

            def conditions(module, args, kwargs, output, name=name, called=called):
                called[name] = output

            def attend(module, args, output, name=name, called=called):
                called[f"{name}.attn1"] = output

            handles += [
                block.register_forward_hook(keep, with_kwargs=True),
                block.norm1.register_forward_hook(conditions, with_kwargs=True),
                block.attn1.register_forward_hook(attend),
            ]
        with torch.no_grad():
            denoiser(latents, timestep=timesteps, **inputs)
        for handle in handles:
            handle.remove()
        for name, (before, after) in streams.items():
            middle = before + called[name][1][:, None] * called[f"{name}.attn1"]
            for key, pair in {
                name: (before, after),
                f"{name}.attn1": (before, middle),
                f"{name}.ff": (middle, after),
            }.items():
                rows.setdefault(key, []).append([t.double().flatten(0, 1) for t in pair])
    return {
        key: [torch.cat(side) for side in zip(*pairs, strict=True)] for key, pairs in rows.items()
    }


def test_changes_are_those_of_the_recorded_stream():
    denoiser = tiny_denoiser()
    adapter = adapter_for(denoiser)
    frame = make_frame(linear_scheduler(), CONFIG)
    data = CalibrationSet(tiny_batches(), adapter, denoiser)
    layers, stages = adapter.layers(denoiser), frame.division.stages
    changes = measure_changes(denoiser, adapter, layers, stages, frame.schedule, data, CONFIG)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in denoiser.modules()) == 0
    for stage, row in zip(stages, changes, strict=True):
        generator = torch.Generator().manual_seed(stage.first + 2)
        drawn = draw_noisy(
            denoiser, adapter, stage, frame.schedule, data, CONFIG, generator, samples=24
        )
        expected = by_hand(denoiser, drawn)
        assert row["error"].keys() == row["cosine"].keys() == expected.keys()
        for name, (before, after) in expected.items():
            error = (after - before).square().sum(1).mean()
            cosine = 1 - torch.nn.functional.cosine_similarity(before, after, dim=1).mean()
            assert row["error"][name] == pytest.approx(float(error), rel=1e-4)
            assert row["cosine"][name] == pytest.approx(float(cosine), rel=1e-3)


@pytest.mark.parametrize("depth_rank", ["curve", "error", "cosine"])
@pytest.mark.parametrize("granularity", ["layers", "blocks"])
def test_whole_layers_go_in_order_of_their_rank(granularity, depth_rank):
    config = PruneConfig(
        macs="0.7x", allocation="optimal", granularity=granularity, depth_rank=depth_rank,
        stages=8, samples=24, steps=16, max_sparsity=1.0,
    )  # fmt: skip
    measured = calibrate(
        tiny_denoiser(), config, scheduler=linear_scheduler(), calibration=tiny_batches()
    )
    report = prune(
        tiny_denoiser(), config, scheduler=linear_scheduler(), measured=measured
    ).report  # fmt: skip
    dense = report.macs_dense_with_attention
    assert report.macs_with_attention == pytest.approx(0.7 * dense, rel=0.02)
    gone = {
        (k, layer.name)
        for k, stage in enumerate(report.stages)
        for layer in stage.layers
        if layer.kept == 0
    }
    assert all(layer.kept in (0, layer.groups) for stage in report.stages for layer in stage.layers)
    if granularity == "blocks":
        blocks = {(k, name.rpartition(".")[0]) for k, name in gone}
        assert len(gone) == 2 * len(blocks)
        if depth_rank != "curve":  # blocks cost all the same, so the lowest ranked go
            ranks = {
                (k, name): value
                for k, row in enumerate(measured.changes)
                for name, value in row[depth_rank].items()
                if not name.endswith(("attn1", "ff"))
            }
            assert blocks == set(sorted(ranks, key=ranks.get)[: len(blocks)])
