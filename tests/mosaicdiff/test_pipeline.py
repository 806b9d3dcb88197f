"""The whole job through the Python interface."""

import json

import pytest
import torch
from diffusers import IPNDMScheduler, UNet2DModel

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.report import report_from_dict

from .conftest import linear_scheduler, sample, tiny_batches, tiny_denoiser

SMALL = {"samples": 32, "steps": 20}


def prune(model, batches=None, **config):
    return mosaicdiff.prune(
        model,
        PruneConfig(**(SMALL | config)),
        scheduler=linear_scheduler(),
        calibration=tiny_batches() if batches is None else batches,
    )


def test_a_bare_denoiser_is_left_as_it_was():
    dense = tiny_denoiser().train()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    result = prune(dense, sparsity=0.4)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert dense.training and result.pipeline is None
    shared = {p.data_ptr() for p in dense.parameters()}
    assert not shared & {p.data_ptr() for p in result.denoiser.parameters()}


def test_a_bare_denoiser_in_a_hand_written_loop():
    dense = tiny_denoiser()
    staged = prune(dense, sparsity=0.2).denoiser
    scheduler = linear_scheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    x = y = torch.randn(2, 2, 8, 8)
    labels = torch.tensor([1, 2])
    for t in scheduler.timesteps:
        x = scheduler.step(dense(x, t.expand(2), labels).sample, t, x).prev_sample
        y = scheduler.step(staged(y, t.expand(2), labels, return_dict=False)[0], t, y).prev_sample
    assert 0 < (x - y).square().mean() < 0.1 * x.square().mean()


def test_sparsity_is_met_over_the_steps():
    for target in (0.1, 0.3, 0.5):
        result = prune(tiny_denoiser(), sparsity=target, steps=50)
        assert result.report.sparsity == pytest.approx(target, abs=0.005)
        steps = [stage.steps for stage in result.report.stages]
        assert sum(steps) == 50


def test_zero_sparsity_changes_nothing(pipe, batches):
    before = sample(pipe)
    mosaicdiff.prune(pipe, PruneConfig(sparsity=0.0, **SMALL), calibration=batches)
    assert (sample(pipe) == before).all()


def test_less_is_lost_with_obs_than_without():
    def lost(**config):
        report = prune(tiny_denoiser(), sparsity=0.4, samples=128, **config).report
        return sum(layer.error for stage in report.stages for layer in stage.layers)

    assert lost() < lost(criterion="magnitude") < lost(criterion="magnitude", compensation="none")


def test_the_same_seed_gives_the_same_bits():
    first, second = (prune(tiny_denoiser(), sparsity=0.4).denoiser for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_report_round_trip_and_tables():
    report = prune(tiny_denoiser(), sparsity=0.3).report
    assert report_from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.stage_table().row_count == 3
    assert report.layer_table().row_count == 6
    assert report.macs_with_attention < report.macs_dense_with_attention


def test_explicit_layers_and_boundaries():
    name = "transformer_blocks.1.ff"
    result = prune(
        tiny_denoiser(),
        boundaries=(300, 600, 800),
        allocation="explicit",
        stage_sparsity=(0.5, 0.25, 0.0, 0.75),
        layer_sparsity={name: (1.0, 0.0, 0.0, 0.5)},
    )
    kept = [
        next(layer.kept for layer in stage.layers if layer.name == name)
        for stage in result.report.stages
    ]
    assert kept == [0, 128, 128, 64]
    assert [stage.first_timestep for stage in result.report.stages] == [800, 600, 300, 0]


def test_round_to_a_multiple():
    report = prune(tiny_denoiser(), sparsity=0.3, round_to=16).report
    kept = [x.kept for s in report.stages for x in s.layers if x.kind == "neurons"]
    assert all(count % 16 == 0 for count in kept)


def test_few_steps_leave_no_empty_stage():
    report = prune(tiny_denoiser(), sparsity=0.3, steps=2).report
    assert all(stage.steps > 0 for stage in report.stages)


def test_plan_runs_nothing(pipe, batches):
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *a: calls.append(1))
    final = mosaicdiff.plan(pipe, PruneConfig(allocation="score", **SMALL), calibration=batches)
    assert final.sparsity == pytest.approx(0.3, abs=0.005)
    assert not calls


def test_progress_reaches_its_end():
    heard = []
    mosaicdiff.prune(
        tiny_denoiser(), PruneConfig(**SMALL), scheduler=linear_scheduler(),
        calibration=tiny_batches(), progress=lambda *row: heard.append(row),
    )  # fmt: skip
    assert heard[-1][1] == heard[-1][2] > 0
    assert {row[0] for row in heard} >= {"calibrate early", "trace late", "fit layers"}


@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failure_changes_nothing(pipe, batches, failure):
    dense = pipe.transformer
    hooks = [len(m._forward_pre_hooks) for m in dense.modules()]

    def fail(*row):
        raise failure

    with pytest.raises(type(failure)):
        mosaicdiff.prune(pipe, PruneConfig(**SMALL), calibration=batches, progress=fail)
    assert pipe.transformer is dense
    assert [len(m._forward_pre_hooks) for m in dense.modules()] == hooks


def test_pruned_twice_is_refused(staged_pipe, batches):
    with pytest.raises(ValueError, match="pruned already"):
        mosaicdiff.prune(staged_pipe, PruneConfig(**SMALL), calibration=batches)


@pytest.mark.parametrize(
    "model, kwargs, message",
    [
        (tiny_denoiser, {"scheduler": None}, "scheduler must be given with a bare denoiser"),
        (tiny_denoiser, {"calibration": "folder"}, "calibration must be batches"),
        (
            tiny_denoiser,
            {"scheduler": IPNDMScheduler()},
            "must be variance preserving",
        ),
        (tiny_denoiser, {"calibration": []}, "at least one sample"),
        (
            tiny_denoiser,
            {"config": PruneConfig(sparsity=0.9, max_sparsity=0.5)},
            r"sparsity must be at most 0\.5000",
        ),
        (tiny_denoiser, {"config": PruneConfig(steps=2000)}, "steps must be at most 1000"),
        (
            tiny_denoiser,
            {"config": PruneConfig(allocation="explicit", stage_sparsity=(0.1,))},
            "one share for each of 3 stages",
        ),
        (
            tiny_denoiser,
            {
                "config": PruneConfig(
                    allocation="explicit",
                    stage_sparsity=(0.1, 0.1, 0.1),
                    layer_sparsity={"nowhere": (0.1, 0.1, 0.1)},
                )
            },
            "layer_sparsity must name layers of the denoiser, but nothing matches 'nowhere'",
        ),
        (lambda: UNet2DModel(sample_size=8, block_out_channels=(32,),
                             down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)),
         {}, "denoiser must be one of DiTTransformer2DModel"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_before_work(model, kwargs, message):
    values = {"scheduler": linear_scheduler(), "calibration": tiny_batches()} | kwargs
    config = values.pop("config", PruneConfig(**SMALL))
    heard = []
    with pytest.raises(ValueError, match=message):
        mosaicdiff.prune(model(), config, progress=lambda *row: heard.append(row), **values)
    assert not heard
