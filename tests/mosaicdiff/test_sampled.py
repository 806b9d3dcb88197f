"""Calibration along the pipeline's own trajectories."""

from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
)

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.groups import input_widths
from mosaicdiff.pipeline import calibrate
from mosaicdiff.request import prepare
from mosaicdiff.statistics.bank import HessianBank
from mosaicdiff.statistics.collect import collect
from mosaicdiff.statistics.sampled import sample_statistics
from mosaicdiff.trajectory.clock import _LISTENERS
from mosaicdiff.trajectory.weights import step_weights

from .conftest import linear_scheduler, tiny_batches, tiny_denoiser, tiny_pipeline

CPU = torch.device("cpu")
LABELS = [3, 1, 4, 1, 5]


def silent(what, done, total):
    pass


def asked(steps=4, stages=1, samples=5, batch=2, **trajectory) -> PruneConfig:
    return PruneConfig(
        sparsity=0.3, allocation="uniform", activations="trajectory", steps=steps, stages=stages,
        trajectory={"samples": samples, "batch_size": batch, "guidance_scale": 1.0} | trajectory,
    )  # fmt: skip


def wide_pipeline(cls=DDIMScheduler):
    pipe = tiny_pipeline(tiny_denoiser()).to(torch.float64)
    if cls is not DDIMScheduler:
        pipe.scheduler = linear_scheduler(cls)
    return pipe


def by_hand(job, labels, batch, guidance, calls_of_step):
    """H of every reader and stage: plain hooks record, then sums with the weights of the steps.

    `calls_of_step` says of the n-th denoiser call which step it belongs to.
    """
    pipe, config = job.pipeline, job.config
    calls, seen = [], {}
    handles = [
        job.denoiser.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0])
        )
        for name in input_widths(job.layers)
    ]
    handles.append(
        job.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(float(kwargs["timestep"].max())),
            with_kwargs=True,
        )
    )
    per_batch = []
    for number in range(0, len(labels), batch):
        torch.manual_seed(config.seed * 1_000_003 + number // batch)
        pipe(
            labels[number : number + batch],
            num_inference_steps=config.steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(config.seed * 1_000_003 + number // batch),
        )
        per_batch.append(len(calls))
    for handle in handles:
        handle.remove()
    starts = [0, *per_batch[:-1]]
    weights = step_weights(config.trajectory.weights, config.steps, config.trajectory.weight_range)
    division = job.frame.division
    found = [{} for _ in division.stages]
    for index, timestep in enumerate(calls):
        call = index - max(start for start in starts if start <= index)
        stage = division.stage_of_timestep(timestep)
        for name, rows in seen.items():
            x = rows[index].reshape(-1, rows[index].shape[-1])
            assert x.dtype == torch.float64
            h, total, weight = found[stage].get(name, (0.0, 0.0, 0.0))
            w = weights[calls_of_step(call)]
            found[stage][name] = h + w * x.T @ x, total + w * x.sum(0), weight + w * len(x)
    return found


@pytest.mark.parametrize(
    "cls, steps, stages, guidance, options",
    [
        (DDIMScheduler, 4, 1, 1.0, {}),
        (DDIMScheduler, 6, 3, 4.0, {}),
        (DDIMScheduler, 1, 1, 0.0, {}),
        (DDIMScheduler, 2, 2, 4.0, {"weights": "linear_increase"}),
        (DPMSolverMultistepScheduler, 12, 3, 4.0, {"weights": "linear_decrease"}),
        (EulerAncestralDiscreteScheduler, 4, 2, 1.0, {"weights": (1.0, 5.0, 0.5, 2.0)}),
        (HeunDiscreteScheduler, 4, 2, 4.0, {}),
        (HeunDiscreteScheduler, 1, 1, 1.0, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or repr(value),
)
def test_hessians_equal_activations_recorded_and_weighed_by_hand(
    cls, steps, stages, guidance, options
):
    pipe = wide_pipeline(cls)
    config = asked(steps, stages, guidance_scale=guidance, **options)
    job = prepare(pipe, config, None, None, prompts=LABELS)
    got = collect(job, job.denoiser, input_widths(job.layers), silent)
    # Heun evaluates twice in every step but the last; the others once.
    twice = cls is HeunDiscreteScheduler
    wanted = by_hand(job, LABELS, 2, guidance, (lambda n: n // 2) if twice else lambda n: n)
    assert len(got) == len(wanted) == stages
    for k, row in enumerate(wanted):
        assert set(got[k]) == set(row) == set(input_widths(job.layers))
        for name, (h, total, weight) in row.items():
            mine = got[k][name].unpack(CPU)
            assert mine.hessian.dtype == torch.float64
            assert mine.weight == pytest.approx(weight, rel=1e-12)
            assert (mine.hessian - h / weight).abs().max() <= 1e-12 * (h / weight).abs().max()
            assert (mine.mean - total / weight).abs().max() <= 1e-12


def test_guidance_doubles_what_is_seen():
    counts = []
    for guidance in (1.0, 4.0):
        pipe = tiny_pipeline(tiny_denoiser())
        job = prepare(pipe, asked(guidance_scale=guidance), None, None, prompts=LABELS)
        (row,) = collect(job, job.denoiser, input_widths(job.layers), silent)
        counts.append(next(iter(row.values())).weight)
    tokens = 16 * 5 * sum(step_weights("log_decrease", 4))
    assert counts == pytest.approx([tokens, 2 * tokens])


def state_of(pipe):
    hooks = [len(module._forward_pre_hooks) for module in pipe.transformer.modules()]
    modes = [module.training for module in pipe.transformer.modules()]
    return (
        hooks, modes, pipe.transformer, pipe.scheduler, dict(pipe._progress_bar_config),
        sorted(vars(pipe.scheduler)), dict(pipe.config),
    )  # fmt: skip


def test_the_pipeline_is_as_it_was():
    pipe = tiny_pipeline(tiny_denoiser())
    pipe.transformer.train()
    before, drawn = state_of(pipe), torch.get_rng_state()
    calibrate(pipe, asked(), prompts=LABELS)
    assert state_of(pipe) == before
    assert _LISTENERS not in vars(pipe.scheduler)
    assert torch.equal(torch.get_rng_state(), drawn)


class Sick:
    """A hook that fails after so many calls."""

    def __init__(self, error, after):
        self.error, self.left = error, after

    def __call__(self, *args):
        self.left -= 1
        if self.left < 0:
            raise self.error


@pytest.mark.parametrize(
    "error, kind",
    [
        (ValueError("no such thing"), ValueError),
        (RuntimeError("device lost"), RuntimeError),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), RuntimeError),
    ],
)
def test_an_exception_names_its_batch_and_leaves_the_sums_as_they_were(error, kind):
    pipe = tiny_pipeline(tiny_denoiser())
    job = prepare(pipe, asked(), None, None, prompts=LABELS)
    widths = input_widths(job.layers)
    # Two whole batches (the first 4 labels) are what the sums must hold.
    whole = [HessianBank(widths)]
    two = replace(job, config=asked(samples=4))
    sample_statistics(two, job.denoiser, whole, widths, lambda done, total: None)
    sick = Sick(error, after=2 * 4 + 2)
    handle = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(sick)
    before, banks = state_of(pipe), [HessianBank(widths)]
    with pytest.raises(kind, match="collect: batch 3 of 3 failed: .*" + str(error)[:5]):
        sample_statistics(job, job.denoiser, banks, widths, lambda done, total: None)
    assert state_of(pipe) == before
    handle.remove()
    assert banks[0]._weights == whole[0]._weights
    for name in widths:
        for mine, wanted in zip(banks[0]._sums[name], whole[0]._sums[name], strict=True):
            assert torch.equal(mine, wanted)


def test_an_interrupt_passes_and_leaves_nothing_behind():
    pipe = tiny_pipeline(tiny_denoiser())
    before = state_of(pipe)
    job = prepare(pipe, asked(), None, None, prompts=LABELS)

    def interrupt(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(job, job.denoiser, input_widths(job.layers), interrupt)
    assert state_of(pipe) == before and _LISTENERS not in vars(pipe.scheduler)


def test_a_snapshot_restores_bit_for_bit_and_forgets_new_readers():
    bank, generator = HessianBank({"a": 5, "b": 3}), torch.Generator().manual_seed(0)
    for _ in range(3):
        bank.update("a", torch.randn(7, 5, generator=generator) / 3, 0.7)
    had = [part.clone() for part in bank._sums["a"]]
    snapshot = bank.snapshot()
    bank.update("a", torch.randn(7, 5, generator=generator))
    bank.update("b", torch.randn(2, 3))
    again = bank.snapshot(bank.snapshot())
    bank.restore(snapshot)
    assert all(torch.equal(x, y) for x, y in zip(bank._sums["a"], had, strict=True))
    assert list(bank._weights) == ["a"] and bank._weights["a"] == pytest.approx(0.7 * 21)
    assert set(again.sums) == {"a", "b"} and not torch.equal(again.sums["a"][0], had[0])
    with pytest.raises(ValueError, match="input of b: no sample"):
        bank.finalize("b")


def test_a_batch_does_not_depend_on_those_before():
    """The last batch alone gives what it adds after others."""
    pipe = wide_pipeline(EulerAncestralDiscreteScheduler)
    sums = []
    for samples in (2, 4):
        job = prepare(pipe, asked(samples=samples), None, None, prompts=LABELS)
        (row,) = collect(job, job.denoiser, input_widths(job.layers), silent)
        sums.append({name: packed.hessian * packed.weight for name, packed in row.items()})
    job = prepare(pipe, asked(samples=2), None, None, prompts=LABELS)
    again = collect(job, job.denoiser, input_widths(job.layers), silent)[0]
    for name, packed in again.items():
        assert torch.equal(packed.hessian * packed.weight, sums[0][name])
        assert not torch.allclose(sums[1][name], 2 * sums[0][name])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_final_latents_come_with_the_conditions_of_the_denoiser(guidance):
    pipe = tiny_pipeline(tiny_denoiser())
    config = asked(guidance_scale=guidance)
    job = prepare(pipe, config, None, None, prompts=LABELS)
    with pytest.raises(ValueError, match="calibration must be given for a test"):
        job.require_data("a test")
    collect(job, job.denoiser, input_widths(job.layers), silent)
    data = job.require_data("a test")
    labels = data.inputs["class_labels"].tolist()
    assert list(data.inputs) == ["class_labels"]
    if guidance == 1.0:
        assert labels == LABELS
    else:
        assert labels == [3, 1, 1000, 1000, 4, 1, 1000, 1000, 5, 1000]
        assert torch.equal(data.latents[0], data.latents[2])
        assert torch.equal(data.latents[8], data.latents[9])
    given = {}
    vae = pipe.vae
    original = vae.decode
    vae.decode = lambda z: given.setdefault("z", z) is None or original(z)
    pipe([3, 1], num_inference_steps=4, guidance_scale=guidance,
         generator=torch.Generator().manual_seed(0))  # fmt: skip
    wanted = given["z"] * vae.config.scaling_factor
    torch.testing.assert_close(data.latents[:2], wanted.float(), rtol=1e-5, atol=1e-6)


def test_given_latents_win():
    pipe = tiny_pipeline(tiny_denoiser())
    job = prepare(pipe, asked(), None, tiny_batches(), prompts=LABELS)
    collect(job, job.denoiser, input_widths(job.layers), silent)
    assert len(job.require_data("a test")) == 48
    assert job.frame.power == pytest.approx(job.data.power)
    bare = prepare(tiny_pipeline(tiny_denoiser()), asked(), None, None)
    assert bare.frame.power == 1.0 and bare.data is None


@pytest.mark.parametrize("allocation", ["uniform", "optimal"])
def test_prune_needs_no_pictures(allocation):
    pipe = tiny_pipeline(tiny_denoiser())
    config = replace(asked(steps=6, stages=3), allocation=allocation)
    result = mosaicdiff.prune(pipe, config, prompts=LABELS)
    assert result.report.sparsity == pytest.approx(0.3, abs=0.02)
    assert pipe.transformer is result.denoiser


def test_what_measures_takes_the_drawn_latents():
    pipe = tiny_pipeline(tiny_denoiser())
    config = replace(asked(steps=6, stages=2), sparsity=None, quality=0.05, probe_samples=4)
    result = mosaicdiff.prune(pipe, replace(config, allocation="optimal"), prompts=LABELS)
    assert result.report.decision.reached <= 0.05
    # From a calibration made before, they are drawn when they are needed.
    pipe = tiny_pipeline(tiny_denoiser())
    measured = calibrate(pipe, asked(steps=6, stages=2), prompts=LABELS)
    result = mosaicdiff.prune(pipe, config, measured=measured, prompts=LABELS)
    assert result.report.decision.reached <= 0.05


def test_bins_are_joined_by_the_weight_of_their_steps():
    pipe = wide_pipeline()
    bins = calibrate(pipe, replace(asked(steps=6, stages="auto"), bins=3), prompts=LABELS)
    assert bins.weighted and len(bins.division) >= 3
    whole = calibrate(pipe, asked(steps=6), prompts=LABELS)
    for name, packed in whole.statistics[0].items():
        wanted = packed.unpack(CPU)
        got = bins.pooled(name, CPU)
        assert got.weight == pytest.approx(wanted.weight)
        assert (got.hessian - wanted.hessian).abs().max() <= 1e-12 * wanted.hessian.abs().max()


@pytest.mark.parametrize(
    "trajectory, message",
    [
        ({"options": {"height": 64}}, "options must be among guidance_scale for this pipeline"),
        ({"options": {"num_inference_steps": 3}}, "got 'num_inference_steps'"),
        ({"options": {"guidance_scale": 3}}, "beside guidance_scale=1.0, got 3"),
        ({"weights": (1.0, 2.0)}, "weights must be 4"),
    ],
)
def test_settings_of_the_run_are_tried_before_work(trajectory, message):
    with pytest.raises(ValueError, match=message):
        prepare(tiny_pipeline(tiny_denoiser()), asked(**trajectory), None, None, prompts=LABELS)


def test_requests_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="prompts must be left out with activations='noised'"):
        mosaicdiff.prune(
            tiny_pipeline(tiny_denoiser()), PruneConfig(), calibration=tiny_batches(), prompts=[1]
        )
    with pytest.raises(ValueError, match="model must be a pipeline with activations='trajectory'"):
        mosaicdiff.prune(tiny_denoiser(), asked(), scheduler=linear_scheduler(), prompts=[1])
