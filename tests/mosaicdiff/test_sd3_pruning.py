"""SD3 from a request to pictures: one choice for both streams, stages that follow the sampler."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchHeunDiscreteScheduler
from safetensors.torch import save_file

import mosaicdiff
from mosaicdiff import PruneConfig, StagedDenoiser
from mosaicdiff.adapters import adapter_for
from mosaicdiff.allocation.planning import make_frame
from mosaicdiff.inputs.load import load_calibration
from mosaicdiff.statistics.capture import capture_inputs
from mosaicdiff.statistics.noising import CalibrationSet, draw_noisy

from .conftest import (
    NO_ENCODERS,
    flow_scheduler,
    linear_scheduler,
    sample_sd3,
    tiny_sd3,
    tiny_sd3_batches,
    tiny_sd3_pipeline,
)

QUICK = {"sparsity": 0.2, "samples": 32, "batch_size": 16, "steps": 12, "probe_samples": 4}


def prune(denoiser, batches=None, **config):
    return mosaicdiff.prune(
        denoiser,
        PruneConfig(**QUICK | config),
        scheduler=flow_scheduler(),
        calibration=tiny_sd3_batches() if batches is None else batches,
    )


def pruned_blocks(result):
    return {
        layer.name.split(".")[1]
        for stage in result.report.stages
        for layer in stage.layers
        if layer.kept < layer.groups
    }


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("allocation", ["uniform", "score", "optimal"])
@pytest.mark.parametrize("kind", [{"dual": (), "qk_norm": None}, {}], ids=["sd3", "sd3.5"])
def test_the_ends_stay_whole_and_the_sparsity_is_met(kind, allocation, stages):
    model = tiny_sd3(layers=4, **kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = prune(model, allocation=allocation, stages=stages)
    assert len(result.denoiser.stage_models) == stages
    assert result.report.sparsity == pytest.approx(0.2, abs=0.005)
    assert pruned_blocks(result) <= {"1", "2"}
    assert all(stage.steps > 0 for stage in result.report.stages)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    layers = adapter_for(model).layers(model)
    adapter_layers = {layer.name: layer for layer in layers}
    saved = sum(
        stage.steps * (row.groups - row.kept) * adapter_layers[row.name].cost
        for stage in result.report.stages
        for row in stage.layers
    )
    report = result.report
    assert report.macs_dense - report.macs == pytest.approx(saved / QUICK["steps"])


def test_whole_ends_can_be_refused():
    result = prune(tiny_sd3(layers=4), allocation="uniform", whole_ends=False)
    assert pruned_blocks(result) == {"0", "1", "2", "3"}


@pytest.mark.parametrize("compensation", ["plain", "none"])
def test_one_choice_of_heads_and_both_readers_refitted(compensation):
    """Against least squares in float64 on activations recorded apart, one problem a reader."""
    model = tiny_sd3()
    config = PruneConfig(
        **QUICK | {"sparsity": None},
        allocation="explicit", stages=1, stage_sparsity=(0.6,), null_share=0.3,
        compensation=compensation, whole_ends=False,
    )  # fmt: skip
    staged = mosaicdiff.prune(
        model, config, scheduler=flow_scheduler(), calibration=tiny_sd3_batches()
    ).denoiser
    adapter, frame = adapter_for(model), make_frame(flow_scheduler(), config)
    stage = frame.division.stages[0]
    data = CalibrationSet(tiny_sd3_batches(), adapter, model)
    generator = torch.Generator().manual_seed(stage.first)
    batches = draw_noisy(model, adapter, stage, frame.schedule, data, config, generator)
    readers = {name: [] for layer in adapter.layers(model) for name in layer.input_names}
    with (
        torch.no_grad(),
        capture_inputs(model, readers, lambda name, x: readers[name].append(x.flatten(0, 1))),
    ):
        for latents, steps, inputs in batches:
            assert 3 < float(steps.min()) and float(steps.max()) <= 1000
            adapter.predict(model, latents, steps, inputs)
    compared = 0
    for layer in adapter.layers(model):
        kept = staged.info.kept[0].get(layer.name)
        if kept is None or len(kept) == 0:
            continue
        columns = layer.columns(kept)
        for reader in layer.readers:
            x = torch.cat(readers[reader.name]).double()
            hessian = x.T @ x / len(x)
            hessian.diagonal().add_(config.damping * hessian.diagonal().mean())
            weight = model.get_submodule(reader.module).weight.double()
            expected, condition = weight[:, columns], 1.0
            if compensation == "plain":
                inside = hessian[columns][:, columns]
                condition = float(torch.linalg.cond(inside))
                expected = torch.linalg.solve(inside, (weight @ hessian)[:, columns].T).T
            found = staged.stage_models[0].get_submodule(reader.module).weight.double()
            # H is kept in float32.
            bound = 10 * torch.finfo(torch.float32).eps * condition * weight.abs().max()
            assert (found - expected).abs().max() <= bound
            if compensation == "plain":
                assert (weight[:, columns] - expected).abs().max() > 50 * bound
            compared += len(layer.readers) == 2
    assert compared >= 2  # both streams of some block


def test_the_denoiser_is_given_the_timestep_of_its_noise():
    """1000 sigma, for every noisy latent of a stage: here all of it is noise."""
    model, config = tiny_sd3(), PruneConfig(samples=64, batch_size=64, null_share=0.0)
    ((latents, inputs),) = tiny_sd3_batches()
    adapter = adapter_for(model)
    data = CalibrationSet([(torch.zeros_like(latents), inputs)], adapter, model)
    frame = make_frame(flow_scheduler(), config)
    for stage in frame.division.stages:
        drawn = draw_noisy(
            model, adapter, stage, frame.schedule, data, config, torch.manual_seed(0)
        )
        ((noisy, steps, _),) = drawn
        ends = frame.schedule.timesteps[[stage.first, stage.last]]
        assert ends[0] - 1e-3 <= float(steps.min()) <= float(steps.max()) <= ends[1] + 1e-3
        scale = noisy.square().mean((1, 2, 3)).sqrt() / (steps / 1000)
        assert 0.7 < float(scale.min()) and float(scale.max()) < 1.3


@pytest.mark.parametrize("stages", [2, 5, 10])
def test_equal_stages_have_equal_steps_of_a_shifted_sampler(stages):
    frame = make_frame(flow_scheduler(), PruneConfig(stages=stages, steps=20))
    assert frame.steps == (20 // stages,) * stages


def test_null_rows_are_those_of_the_empty_prompt():
    model = tiny_sd3()
    adapter = adapter_for(model)
    _, inputs = tiny_sd3_batches(4)[0]
    rows = torch.tensor([True, False, False, True])
    found = adapter.null_inputs(model, inputs, rows)
    assert set(found) == {"encoder_hidden_states", "pooled_projections"}
    for name, value in found.items():
        assert torch.equal(value[rows], inputs[f"negative_{name}"][rows])
        assert torch.equal(value[~rows], inputs[name][~rows])


def test_no_null_condition_is_refused_before_any_work():
    model, batches = tiny_sd3(), tiny_sd3_batches(null=False)
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(ValueError, match="null_share must be 0 where the batches do not hold"):
        prune(model, batches)
    assert not calls
    assert prune(model, batches, null_share=0.0).report.sparsity > 0.19


def test_a_scheduler_of_another_family_is_refused():
    with pytest.raises(ValueError, match="flow matching for SD3Transformer2DModel, got DDIM"):
        mosaicdiff.prune(tiny_sd3(), scheduler=linear_scheduler(), calibration=tiny_sd3_batches())


@pytest.mark.parametrize(
    "config",
    [
        {"granularity": "unstructured", "sparsity": 0.5},
        {"granularity": "2:4", "sparsity": None},
        {"granularity": "layers", "sparsity": 0.3, "depth_rank": "error"},
        {"packages": 2, "allocation": "uniform"},
        {"choice": "shared", "compensation": "affine"},
        {"criterion": "wanda"},
        {"stages": "auto", "bins": 4},
        {"sparsity": None, "macs": "0.85x"},
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()),
)
def test_every_way_of_pruning_saves_what_it_made(config, tmp_path):
    result = prune(tiny_sd3(layers=4), **config)
    assert result.report.macs <= result.report.macs_dense
    result.denoiser.save_pretrained(tmp_path / "m")
    loaded = StagedDenoiser.from_pretrained(tmp_path / "m")
    latents, inputs = tiny_sd3_batches(2)[0]
    predict = loaded.adapter.predict
    for t in (990.0, 500.0, 9.0):
        made, read = (
            predict(model, latents, torch.full((2,), t), inputs)
            for model in (result.denoiser, loaded)
        )
        assert torch.equal(made, read)


def spoiled(name, change):
    latents, inputs = tiny_sd3_batches(4)[0]
    return [(latents, inputs | {name: change(inputs[name])})]


@pytest.mark.parametrize(
    "batches, message",
    [
        (spoiled("encoder_hidden_states", lambda x: x[..., :-1]), r"\(4, text tokens, 12\)"),
        (spoiled("encoder_hidden_states", lambda x: x[:3]), r"got \(3, 5, 12\)"),
        (spoiled("negative_encoder_hidden_states", lambda x: x[:, :4]), r"must be \(4, 5, 12\)"),
        (spoiled("pooled_projections", lambda x: x[:, None]), r"must be \(4, 10\)"),
        (spoiled("pooled_projections", lambda x: x.long()), "must be floating-point"),
        (spoiled("pooled_projections", lambda x: x / 0), "finite floating-point"),
        ([(tiny_sd3_batches()[0][0], {})], "inputs of a batch for SD3Transformer2DModel must be"),
        ([(torch.randn(4, 2, 8, 4), tiny_sd3_batches(4)[0][1])], r"latents must be \(B, 2, 8, 8\)"),
        (tiny_sd3_batches() + tiny_sd3_batches(text=4), "the same names and shapes"),
        (tiny_sd3_batches() + tiny_sd3_batches(null=False), "the same names and shapes"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        prune(tiny_sd3(), batches)


@pytest.fixture
def staged_sd3():
    pipeline = tiny_sd3_pipeline(tiny_sd3(layers=4))
    config = PruneConfig(**QUICK | {"steps": 20}, allocation="score")
    mosaicdiff.prune(pipeline, config, calibration=tiny_sd3_batches())
    return pipeline


def record(staged):
    """Note (stage, timestep) of every stage call."""
    route = []
    for index, model in enumerate(staged.stage_models):

        def note(module, args, kwargs, index=index):
            route.append((index, kwargs["timestep"]))

        model.register_forward_pre_hook(note, with_kwargs=True)
    return route


def reading(staged, timestep):
    """The stage by what the denoiser is given, which is 1000 sigma."""
    sigma = float(timestep.max()) / 1000
    snr = 2 * (np.log(max(1 - sigma, 1e-9)) - np.log(sigma))
    return int(np.searchsorted(staged.division.boundaries, snr))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(
    "make",
    [
        flow_scheduler,
        lambda: flow_scheduler(shift=1.0),
        lambda: flow_scheduler(use_karras_sigmas=True),
        lambda: flow_scheduler(use_dynamic_shifting=True),
        lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    ],
    ids=["shift 3", "no shift", "karras", "dynamic shift", "heun"],
)
def test_the_route_is_that_of_reading_the_timestep(staged_sd3, make, guidance):
    staged_sd3.scheduler = make()
    staged = staged_sd3.transformer
    route = record(staged)
    attached = sample_sd3(staged_sd3, steps=10, guidance=guidance)
    sample_sd3(staged_sd3, steps=5, guidance=guidance)
    assert [stage for stage, _ in route] == [reading(staged, t) for _, t in route]
    assert {stage for stage, _ in route} == {0, 1, 2}
    staged.detach()
    assert (sample_sd3(staged_sd3, steps=10, guidance=guidance) == attached).all()


def test_skipping_layers_for_guidance_does_not_move_the_clock(staged_sd3):
    staged = staged_sd3.transformer
    route = record(staged)
    sample_sd3(staged_sd3, steps=10, guidance=4.0, skip_guidance_layers=[1])
    assert len(route) > 10
    assert [stage for stage, _ in route] == [reading(staged, t) for _, t in route]


def test_rows_of_two_stages_are_refused_and_a_copy_reads_for_itself(staged_sd3):
    staged = staged_sd3.transformer
    staged.detach()
    _, inputs = tiny_sd3_batches(2)[0]
    latents, steps = torch.randn(2, 2, 8, 8), torch.tensor([999.5, 2.5])
    with pytest.raises(ValueError, match=r"one stage for the whole batch, got 2\.5\.\.999\.5"):
        staged.adapter.predict(staged, latents, steps, inputs)
    twin = copy.deepcopy(staged)
    late = torch.full((2,), 2.5)
    expected = staged.adapter.predict(staged.stage_models[2], latents, late, inputs)
    assert torch.equal(staged.adapter.predict(twin, latents, late, inputs), expected)


def test_a_whole_pipeline_is_saved_and_loaded_by_plain_diffusers(staged_sd3, tmp_path):
    before = sample_sd3(staged_sd3, guidance=4.0)
    staged_sd3.save_pretrained(tmp_path / "m")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "m", **NO_ENCODERS)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(staged_sd3)
    assert isinstance(loaded.transformer, StagedDenoiser)
    assert any(s is loaded.scheduler for s in loaded.transformer._clock.schedulers)
    assert (sample_sd3(loaded, guidance=4.0) == before).all()
    loaded.to(torch.bfloat16)
    assert loaded.transformer.dtype == torch.bfloat16


def test_half_precision_is_pruned_in_its_own_type():
    result = prune(tiny_sd3().to(torch.bfloat16))
    assert {p.dtype for p in result.denoiser.parameters()} == {torch.bfloat16}
    assert result.report.sparsity == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("null", [True, False])
def test_a_file_of_encodings_is_a_calibration(tmp_path, suffix, null):
    pipeline = tiny_sd3_pipeline(tiny_sd3())
    latents, inputs = tiny_sd3_batches(6, null=null)[0]
    # The empty prompt has one encoding: a row of it is enough.
    held = {k: v[:1] if k.startswith("negative_") else v for k, v in inputs.items()}
    held = {name: value.contiguous() for name, value in held.items()} | {"latents": latents}
    path = tmp_path / f"held.{suffix}"
    if suffix == "npz":
        np.savez(path, **{name: value.numpy() for name, value in held.items()})
    else:
        save_file(held, path)
    ((found, conditions),) = load_calibration(path, pipeline)
    assert torch.equal(found, latents) and conditions.keys() == inputs.keys()
    assert all(torch.equal(conditions[name], inputs[name]) for name in inputs)
    share = 0.1 if null else 0.0
    config = PruneConfig(**QUICK, null_share=share, allocation="uniform")
    assert mosaicdiff.prune(pipeline, config, calibration=path).report.sparsity > 0.19


def test_what_says_nothing_of_prompts_is_refused(tmp_path):
    pipeline = tiny_sd3_pipeline(tiny_sd3())
    np.savez(tmp_path / "l.npz", latents=np.zeros((1, 2, 8, 8)), labels=np.zeros(1, dtype=int))
    with pytest.raises(ValueError, match="must hold 'latents' and 'encoder_hidden_states'"):
        load_calibration(tmp_path / "l.npz", pipeline)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold images .* with captions, or"):
        load_calibration(tmp_path / "empty", pipeline)
    with pytest.raises(ValueError, match="latents and encoder_hidden_states and pooled"):
        load_calibration(None, pipeline)


def test_a_calibration_kept_in_a_file_gives_the_same_model(tmp_path):
    from mosaicdiff.pipeline import calibrate
    from mosaicdiff.statistics.calibration_file import load_calibration_file, save_calibration

    model, config = tiny_sd3(layers=4), PruneConfig(**QUICK)
    batches, scheduler = tiny_sd3_batches(), flow_scheduler()
    measured = calibrate(model, config, scheduler=scheduler, calibration=batches)
    save_calibration(measured, tmp_path / "sd3.cal")
    read = load_calibration_file(tmp_path / "sd3.cal")
    assert read.layers == measured.layers  # with their norms
    again = mosaicdiff.prune(model, config, scheduler=scheduler, measured=read).denoiser
    at_once = prune(model).denoiser
    for name, parameter in at_once.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    with pytest.raises(ValueError, match="noise schedule must be"):
        other = flow_scheduler(shift=2.0)
        mosaicdiff.prune(model, config, scheduler=other, measured=read)
