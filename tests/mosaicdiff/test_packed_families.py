"""FLUX, FLUX.2, Qwen-Image and HunyuanVideo: pruned through the public interface."""

import fnmatch

import pytest
import torch

import mosaicdiff
from mosaicdiff import PruneConfig, StagedDenoiser
from mosaicdiff.adapters import adapter_for
from mosaicdiff.allocation.planning import make_frame
from mosaicdiff.allocation.timing import layer_inputs, narrowed, timed_module
from mosaicdiff.statistics.noising import CalibrationSet, draw_noisy
from mosaicdiff.surgery import Surgeon

from .cases_a import (
    PACKED,
    VIDEO,
    flux2_inputs,
    flux_inputs,
    hunyuan_inputs,
    qwen_inputs,
    tiny_flux,
    tiny_flux2,
    tiny_hunyuan,
    tiny_qwen,
)
from .conftest import flow_scheduler

pytestmark = pytest.mark.models

QUICK = {
    "sparsity": 0.3, "samples": 16, "batch_size": 8, "steps": 6, "stages": 2, "probe_samples": 2,
    "null_share": 0.0,
}  # fmt: skip


def clean(shape, count=16):
    """Latents that a few directions span, as those of pictures."""
    generator = torch.Generator().manual_seed(7)
    size = torch.Size(shape).numel()
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    return (torch.randn(count, size, generator=generator) @ mixing).reshape(count, *shape)


#: Denoiser, shape of a sample's latents, conditions.
FAMILIES = {
    "flux": (tiny_flux, PACKED, flux_inputs),
    "flux.2": (tiny_flux2, PACKED, flux2_inputs),
    "qwen-image": (tiny_qwen, PACKED, qwen_inputs),
    "hunyuan-video": (tiny_hunyuan, VIDEO, hunyuan_inputs),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    make, shape, inputs = FAMILIES[request.param]
    return make(), [(clean(shape), inputs(16))]


def prune(model, batches, **config):
    asked = PruneConfig(**QUICK | config)
    return mosaicdiff.prune(model, asked, scheduler=flow_scheduler(), calibration=batches)


@pytest.mark.parametrize(
    "config",
    [
        {"whole_ends": False, "allocation": "optimal"},
        {"whole_ends": False, "allocation": "score", "packages": 2, "stages": 1},
        {"granularity": "unstructured", "sparsity": 0.5, "stages": 1},
        {"granularity": "2:4", "sparsity": None, "stages": 1},
        {"granularity": "unstructured", "sparsity": 0.5, "stages": 1, "packages": 2},
    ],
    ids=lambda c: " ".join(
        str(v) for k, v in c.items() if k in ("granularity", "packages", "allocation")
    ),
)
def test_a_bare_denoiser_is_pruned_saved_and_loaded(family, config, tmp_path):
    model, batches = family
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = prune(model, batches, **config)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    staged, report = result.denoiser, result.report
    if "granularity" not in config:
        assert report.sparsity == pytest.approx(0.3, abs=0.03)
        kept = {row.kept / row.groups for stage in report.stages for row in stage.layers}
        assert len(kept) > 1  # uneven
        packed = [r for r in adapter_for(model).layers(model) if r.readers[0].stop is not None]
        gone = {row.name for s in report.stages for row in s.layers if row.kept < row.groups}
        assert not packed or gone & {row.name for row in packed}
    else:
        zeros = [float((p == 0).float().mean()) for p in staged.stage_models[0].parameters()]
        assert max(zeros) >= 0.49
    staged.save_pretrained(tmp_path / "m")
    loaded = StagedDenoiser.from_pretrained(tmp_path / "m")
    sample = batches[0][0][:2]
    inputs = {name: value[:2] for name, value in batches[0][1].items()}
    for t in (990.0, 9.0):
        made, read = (
            staged.adapter.predict(each, sample, torch.full((2,), t), inputs)
            for each in (staged, loaded)
        )
        assert torch.isfinite(made).all() and torch.equal(made, read)


@pytest.mark.parametrize(
    "name, layers, blocks",
    [  # shares of the MACs that whole ones come to
        ("flux", 0.287, 0.25),
        ("flux.2", 0.2333, 0.25),
        ("qwen-image", 0.2963, 0.3333),
        ("hunyuan-video", 0.25, 0.25),
    ],
)
def test_whole_layers_and_blocks_go(name, layers, blocks):
    make, shape, inputs = FAMILIES[name]
    for granularity, sparsity in (("layers", layers), ("blocks", blocks)):
        result = prune(
            make(), [(clean(shape), inputs(16))], granularity=granularity, sparsity=sparsity,
            whole_ends=False, stages=1,
        )  # fmt: skip
        rows = [row for stage in result.report.stages for row in stage.layers]
        assert {row.kept in (0, row.groups) for row in rows} == {True}
        assert result.report.sparsity == pytest.approx(sparsity, abs=0.02)


@pytest.mark.parametrize("rank", ["error", "cosine"])
def test_a_depth_rank_that_is_not_measured_is_refused_before_work(family, rank):
    model, batches = family
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(ValueError, match=f"depth_rank must be 'curve' for .*got '{rank}'"):
        prune(model, batches, granularity="layers", depth_rank=rank)
    assert not calls


@pytest.mark.parametrize("name", ["flux", "flux.2", "hunyuan-video"])
def test_a_bias_that_two_layers_share_is_not_fitted(name):
    make, shape, inputs = FAMILIES[name]
    batches = [(clean(shape), inputs(16))]
    with pytest.raises(ValueError, match=r"'affine' for single_transformer_blocks.*one bias"):
        prune(make(), batches, compensation="affine", whole_ends=False)
    # Where no packed reader is pruned it can be had.
    alone = prune(
        make(), batches, compensation="affine", exclude=("single_transformer_blocks",),
        sparsity=0.1, whole_ends=False,
    )  # fmt: skip
    assert alone.report.sparsity > 0


def test_affine_is_had_where_no_reader_is_packed():
    batches = [(clean(PACKED), qwen_inputs(16))]
    assert prune(tiny_qwen(), batches, compensation="affine").report.sparsity > 0.29


#: Of each family with parallel blocks, the linear that reads heads and neurons.
READERS = {"flux": "proj_out", "flux.2": "attn.to_out", "hunyuan-video": "proj_out"}


def by_hand(model, readers, config, batches):
    """Inputs of linears, whole, recorded by hooks of our own at the engine's draws."""
    adapter, frame = adapter_for(model), make_frame(flow_scheduler(), config)
    stage, data = frame.division.stages[0], CalibrationSet(batches, adapter, model)
    generator = torch.Generator().manual_seed(stage.first)
    drawn = draw_noisy(model, adapter, stage, frame.schedule, data, config, generator)
    seen = {name: [] for name in readers}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].flatten(0, 1).double())
        )
        for name in readers
    ]
    with torch.no_grad():
        for noisy, steps, inputs in drawn:
            adapter.predict(model, noisy, steps, inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("name", READERS)
def test_packed_readers_have_statistics_and_least_squares_of_their_own(name):
    """Against slices of the whole input, with the columns' places written out here."""
    make, shape, inputs = FAMILIES[name]
    model, batches = make(), [(clean(shape), inputs(16))]
    config = PruneConfig(
        **QUICK | {"sparsity": None, "stages": 1},
        allocation="explicit", stage_sparsity=(0.5,), whole_ends=False,
    )  # fmt: skip
    linears = [f"single_transformer_blocks.{i}.{READERS[name]}" for i in range(2)]
    whole = by_hand(model, linears, config, batches)
    measured = mosaicdiff.calibrate(model, config, scheduler=flow_scheduler(), calibration=batches)
    pruned = prune(
        model, batches, sparsity=None, stages=1, allocation="explicit", stage_sparsity=(0.5,),
        whole_ends=False,
    ).denoiser  # fmt: skip
    heads = 24  # columns: 3 heads of 8
    for index, linear in enumerate(linears):
        dense = model.get_submodule(linear).weight.double()
        columns = dense.shape[1]
        left = pruned.stage_models[0].get_submodule(linear).weight.double()
        kept = pruned.info.kept[0]
        block = f"single_transformer_blocks.{index}"
        own = kept[f"{block}.attn"]
        own = (own[:, None] * 8 + torch.arange(8)).flatten()
        parts = {f"{linear}[0:{heads}]": own, f"{linear}[{heads}:{columns}]": kept[f"{block}.mlp"]}
        assert left.shape[1] == sum(map(len, parts.values())) < columns
        found = dict(zip(parts, left.split([len(k) for k in parts.values()], dim=1), strict=True))
        slices = dict(zip(parts, (slice(0, heads), slice(heads, None)), strict=True))
        for label, groups in parts.items():
            x, weight = whole[linear][:, slices[label]], dense[:, slices[label]]
            hessian = x.T @ x / len(x)
            statistics = measured.statistics[0][label].unpack(torch.device("cpu"))
            torch.testing.assert_close(
                statistics.hessian.double(), hessian, rtol=1e-4, atol=1e-5 * float(hessian.max())
            )
            hessian.diagonal().add_(config.damping * hessian.diagonal().mean())
            inside = hessian[groups][:, groups]
            expected = torch.linalg.solve(inside, (weight @ hessian)[:, groups].T).T
            condition = float(torch.linalg.cond(inside)) if len(groups) else 1.0
            # H is kept in float32.
            bound = 10 * torch.finfo(torch.float32).eps * condition * weight.abs().max()
            assert (found[label] - expected).abs().max() <= bound
            assert (weight[:, groups] - expected).abs().max() > 10 * bound
        bias = model.get_submodule(linear).bias
        if bias is not None:
            assert torch.equal(pruned.stage_models[0].get_submodule(linear).bias, bias)


def linears_of(names, model):
    return {
        name
        for pattern in names
        for name, module in model.named_modules()
        if fnmatch.fnmatchcase(name, pattern) and isinstance(module, torch.nn.Linear)
    }


@pytest.mark.parametrize("name", ["flux", "flux.2", "qwen-image"])
def test_writers_and_readers_are_those_of_tensor_parallelism(name):
    """What diffusers shards by rows and columns is what a layer's groups lie in."""
    model = FAMILIES[name][0]()
    plan = {pattern: style for pattern, style in model._tp_plan.items()}
    columnwise, rowwise = [], []
    for pattern, style in plan.items():
        label = style if isinstance(style, str) else type(style).__name__.lower()
        (columnwise if "col" in label else rowwise).append(pattern)
    layers = adapter_for(model).layers(model)
    writers = {writer.module for layer in layers for writer in layer.writers}
    readers = {reader.module for layer in layers for reader in layer.readers}
    assert writers == linears_of(columnwise, model) and columnwise
    assert readers == linears_of(rowwise, model) and rowwise
    for name, module in model.named_modules():  # the packed ones: where their parts begin
        for attribute, runs in (
            ("_tp_packed_col_blocks", [r for x in layers for w in x.writers
                                       if w.module == name for r in w.starts]),
            ("_tp_packed_row_blocks", [r.start for x in layers for r in x.readers
                                       if r.module == name]),
        ):  # fmt: skip
            blocks = getattr(module, attribute, None)
            if blocks is not None:
                assert sorted(runs) == [sum(blocks[:i]) for i in range(len(blocks))]


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("flux", {"img_ids": lambda x: x[:, :-1]}, r"packed \(B, T, C\)"),
        (
            "flux",
            {"img_ids": None},
            "must be encoder_hidden_states and .* and guidance and img_ids",
        ),
        ("flux.2", {"img_ids": lambda x: x.float()}, "img_ids must be whole numbers"),
        ("flux.2", {"img_ids": lambda x: x + torch.arange(16)[:, None, None]}, "the same for all"),
        ("qwen-image", {"img_shapes": lambda x: x + 1}, "the tokens of img_shapes"),
        ("hunyuan-video", {"encoder_attention_mask": None}, "encoder_attention_mask"),
    ],
)
def test_batches_that_do_not_fit_are_refused(name, change, message):
    make, shape, inputs = FAMILIES[name]
    given = inputs(16)
    for key, spoil in change.items():
        value = given.pop(key)
        if spoil is not None:
            given[key] = spoil(value)
    with pytest.raises(ValueError, match=message):
        prune(make(), [(clean(shape), given)])


@pytest.mark.parametrize(
    "make", [lambda: tiny_flux(guidance=False), lambda: tiny_flux2(guidance=False)]
)
def test_guidance_is_asked_for_only_where_it_is_embedded(make):
    model = make()
    inputs = flux_inputs(16) if type(model).__name__.startswith("FluxT") else flux2_inputs(16)
    del inputs["guidance"]
    assert prune(model, [(clean(PACKED), inputs)]).report.sparsity > 0.29
    with pytest.raises(ValueError, match="and guidance"):
        prune(tiny_flux(), [(clean(PACKED), flux_inputs(16, guidance=False))])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tiny_flux(out_channels=4), r"out_channels must be in_channels \(8\), got 4"),
        (lambda: tiny_hunyuan(image_condition_type="token_replace"), "HunyuanVideo from images"),
        (lambda: tiny_qwen(use_layer3d_rope=True), "use_layer3d_rope must be off"),
    ],
)
def test_kinds_that_are_not_handled_are_refused(make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        adapter_for(model).check(model)


def test_layers_that_share_a_module_are_timed_by_their_block(family):
    """At every width the timed module runs with the inputs that the dense one has."""
    model, ((latents, inputs),) = family
    adapter = adapter_for(model)
    layers = adapter.layers(model)
    for layer in layers:
        packed = layer.readers[0].stop is not None
        assert timed_module(layer) == ((layer.block, False) if packed else (layer.name, True))
    names = {timed_module(layer)[0] for layer in layers}

    def call():
        adapter.predict(model, latents, torch.full((16,), 500.0), inputs)

    with torch.no_grad():
        given = layer_inputs(model, names, call)
        surgeon = Surgeon(adapter, layers)
        for layer in layers:
            name = timed_module(layer)[0]
            args, kwargs = given[name]
            expected = flat(model.get_submodule(name)(*args, **kwargs))
            for kept in (0, 1, layer.groups):
                found = flat(narrowed(model, surgeon, layer, kept)(*args, **kwargs))
                same = torch.allclose(found, expected, atol=1e-5)
                assert found.shape == expected.shape and same == (kept == layer.groups)


def flat(output):
    tensors = output if isinstance(output, tuple) else (output,)
    return torch.cat([tensor.flatten() for tensor in tensors])
