"""Staged denoisers without some of their single weights: what they compute, hold and save."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from safetensors.torch import load_file, save_file

import mosaicdiff
from mosaicdiff.adapters import adapter_for
from mosaicdiff.checkpoint import CONFIG, storage_of
from mosaicdiff.evaluate.cost import denoiser_size
from mosaicdiff.masked_storage import pack_mask, unpack_mask
from mosaicdiff.pack import LayerState, StageBuilder
from mosaicdiff.report import PruneReport, StageReport, report_from_dict, weight_rows
from mosaicdiff.runtime import StagedDenoiser
from mosaicdiff.solving.masked import assemble_weights
from mosaicdiff.stage_state import MaskedState

from .conftest import sample, tiny_denoiser, tiny_pipeline
from .masked import mask_denoiser

WEIGHTS = "diffusion_pytorch_model.safetensors"
FF = "transformer_blocks.1.ff.net.2"
STAGED = {
    "one stage": {},
    "2:4": {"pattern": (2, 4)},
    "two stages": {"shares": (0.7, 0.3)},
    "three, one whole": {"shares": (0.6, None, 0.4)},
    "two of three alike": {"shares": (0.5, 0.5, 0.2), "criterion": "magnitude"},
    "some linears": {"shares": (0.5, 0.5), "only": [["*.attn1"], ["*.1", "*.to_q"]]},
    "nothing and all": {"shares": (0.0, 1.0)},
}


def run_stages(staged):
    x, labels = torch.randn(2, 2, 8, 8, generator=torch.manual_seed(1)), torch.tensor([1, 2])
    x = x.to(staged.dtype)
    stages = staged.division.stages
    return [staged(x, torch.tensor([s.first] * 2), labels).sample for s in stages]


def assert_same(first, second):
    for a, b in zip(run_stages(first), run_stages(second), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.masks, second.masks, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for a, b in zip(first.stage_models, second.stage_models, strict=True):
        states = a.state_dict(), b.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("bias", [True, False])
def test_a_stage_runs_the_pruned_weights(bias):
    dense = tiny_denoiser(bias=bias)
    staged, solutions = mask_denoiser(dense, shares=(0.6, 0.2))
    expected = []
    for solved in solutions:
        model = copy.deepcopy(dense)
        for name, solution in solved.items():
            model.get_submodule(name).weight.data = solution.weight
        expected.append(model)
    x, labels = torch.randn(2, 2, 8, 8, generator=torch.manual_seed(1)), torch.tensor([1, 2])
    for model, stage, got in zip(expected, staged.division.stages, run_stages(staged), strict=True):
        assert torch.equal(model(x, torch.tensor([stage.first] * 2), labels).sample, got)
    assert [set(masks) for masks in staged.masks] == [set(solved) for solved in solutions]
    assert len(solutions[0]) == 18 and staged.info.kept == [{}, {}]


def test_what_is_not_pruned_is_shared():
    staged, _ = mask_denoiser(shares=(0.6, 0.2), only=[["*.ff.net.2"], ["*.ff.net.2", "*.to_q"]])
    first, second = staged.stage_models
    for name, parameter in first.named_parameters():
        own = any(name == f"{n}.weight" for masks in staged.masks for n in masks)
        assert (parameter is second.get_parameter(name)) != own
    staged.to(torch.bfloat16)
    assert first.get_parameter(f"{FF}.bias") is second.get_parameter(f"{FF}.bias")


def test_stages_that_come_out_equal_share_their_weights():
    staged, _ = mask_denoiser(criterion="magnitude", shares=(0.5, 0.5, 0.2))
    first, second, third = (stage.get_submodule(FF).weight for stage in staged.stage_models)
    assert first is second and first is not third


@pytest.mark.parametrize("options", STAGED.values(), ids=STAGED)
def test_round_trip_is_bit_equal(options, tmp_path):
    staged, _ = mask_denoiser(**options)
    staged.save_pretrained(tmp_path / "m")
    loaded = StagedDenoiser.from_pretrained(tmp_path / "m")
    assert_same(staged, loaded)
    loaded.save_pretrained(tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert denoiser_size(loaded) == denoiser_size(staged)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (staged, loaded)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_on_loading(dtype, tmp_path):
    staged, _ = mask_denoiser(shares=(0.5, 0.3))
    staged.save_pretrained(tmp_path / "m")
    loaded = StagedDenoiser.from_pretrained(tmp_path / "m", torch_dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    # The table of positions is no parameter and stays float32 on loading.
    assert_same(staged.to(dtype), loaded.to(dtype))


def test_plain_diffusers_loads_it(tmp_path):
    staged, _ = mask_denoiser(shares=(0.6, 0.2))
    pipe = tiny_pipeline(tiny_denoiser())
    pipe.register_modules(transformer=staged)
    before = sample(pipe)
    pipe.save_pretrained(tmp_path / "m")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "m")
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.transformer, StagedDenoiser)
    assert (sample(loaded) == before).all()
    other = DiTPipeline.from_pipe(loaded)
    assert other.transformer is loaded.transformer
    half = DiTPipeline.from_pretrained(tmp_path / "m", torch_dtype=torch.float16)
    assert half.transformer.dtype == torch.float16


@pytest.mark.parametrize("dtype, share", [(torch.bfloat16, 9 / 16), (torch.float32, 17 / 32)])
def test_half_of_the_weights_take_their_share_of_the_disk(dtype, share, tmp_path):
    dense = tiny_denoiser().to(dtype)
    staged, solutions = mask_denoiser(dense)
    staged.save_pretrained(tmp_path / "m")
    whole = sum(p.numel() for p in dense.parameters()) * dtype.itemsize
    masked = sum(s.mask.numel() for s in solutions[0].values()) * dtype.itemsize
    tensors = load_file(tmp_path / "m" / WEIGHTS)
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    assert stored == whole - masked + masked * share
    size = (tmp_path / "m" / WEIGHTS).stat().st_size
    assert stored < size < stored + 40_000  # names and shapes
    count = sum(p.numel() for p in dense.parameters()) - masked // dtype.itemsize // 2
    assert denoiser_size(staged) == (count, stored)


def test_equal_stages_are_stored_once():
    one, _ = mask_denoiser(criterion="magnitude")
    three, _ = mask_denoiser(criterion="magnitude", shares=(0.5, 0.5, 0.5))
    assert denoiser_size(one) == denoiser_size(three)
    tensors, storage, aliases = storage_of(three)
    assert storage[f"{FF}.weight"] == "masked"
    assert aliases[f"mask.2.{FF}.weight"] == f"mask.0.{FF}.weight"
    assert aliases[f"values.1.{FF}.weight"] == f"values.0.{FF}.weight"
    assert f"shared.{FF}.weight" not in tensors and f"union.{FF}.weight" not in tensors


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8), (7, 9)])
def test_masks_are_packed_by_bits(shape):
    mask = torch.rand(shape) < 0.5
    packed = pack_mask(mask)
    assert packed.numpy().tobytes() == np.packbits(mask.numpy()).tobytes()
    assert torch.equal(unpack_mask(packed, shape), mask)


def test_a_kept_zero_stays_kept(tmp_path):
    staged, _ = mask_denoiser()
    weight = staged.stage_models[0].get_submodule(FF).weight
    kept = staged.masks[0][FF]
    weight.data[kept.nonzero()[0][0], kept.nonzero()[0][1]] = 0.0
    staged.save_pretrained(tmp_path / "m")
    assert_same(staged, StagedDenoiser.from_pretrained(tmp_path / "m"))


def test_training_that_keeps_the_zeros_is_saved_and_other_is_refused(tmp_path):
    staged, _ = mask_denoiser(shares=(0.5, 0.3))
    linear = staged.stage_models[1].get_submodule(FF)
    linear.weight.data += 0.5
    with pytest.raises(ValueError, match=rf"save_pretrained: {FF}.weight of stage 1 must be zero"):
        staged.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    linear.weight.data.mul_(staged.masks[1][FF])
    staged.save_pretrained(tmp_path / "m")
    assert_same(staged, StagedDenoiser.from_pretrained(tmp_path / "m"))


def test_whole_stages_that_part_are_refused(tmp_path):
    staged, _ = mask_denoiser(shares=(0.5, None, None))
    builder = StageBuilder(staged.stage_models[2])
    own = copy.deepcopy(staged.stage_models[2].get_submodule(FF))
    own.weight.data += 1
    builder.replace(FF, own)
    staged.stage_models[2] = builder.root
    with pytest.raises(ValueError, match=f"{FF}.weight must be shared by all stages that keep it"):
        staged.save_pretrained(tmp_path / "m")


def drop(name):
    return lambda tensors: tensors.pop(name)


def change(name, how):
    def spoil(tensors):
        tensors[name] = how(tensors[name]).contiguous()

    return spoil


MASK, VALUES = f"mask.0.{FF}.weight", f"values.0.{FF}.weight"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (drop(MASK), f"weights must hold {MASK}, but they do not"),
        (drop(VALUES), f"weights must hold {VALUES}, but they do not"),
        (change(VALUES, lambda t: t[:-1]), rf"{VALUES} must be \(2048,\), got \(2047,\)"),
        (change(MASK, lambda t: t[:-1]), rf"{MASK} must be \(512,\) torch.uint8, got \(511,\)"),
        (change(MASK, lambda t: t.float()), rf"{MASK} must be \(512,\) torch.uint8, .*float32"),
        (drop(f"union.{FF}.bias"), rf"weights must hold .*{FF}\.bias"),
    ],
    ids=["mask", "values", "few values", "few bits", "mask type", "bias"],
)
def test_damage_is_named(spoil, message, tmp_path):
    staged, _ = mask_denoiser()
    staged.save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / WEIGHTS)
    spoil(tensors)
    save_file(tensors, tmp_path / "m" / WEIGHTS)
    with pytest.raises(ValueError, match=f"StagedDenoiser: {message}"):
        StagedDenoiser.from_pretrained(tmp_path / "m")


def test_bits_past_the_end_are_damage():
    packed = pack_mask(torch.ones(3, 3, dtype=torch.bool))
    packed[-1] |= 1
    with pytest.raises(ValueError, match="must have nothing set after bit 9"):
        unpack_mask(packed, (3, 3))


def test_a_linear_of_another_model_is_named(tmp_path):
    staged, _ = mask_denoiser()
    staged.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / CONFIG).read_text())
    config["storage"]["nowhere.weight"] = "masked"
    (tmp_path / "m" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="nowhere.weight must be in the base model"):
        StagedDenoiser.from_pretrained(tmp_path / "m")


def test_states_that_do_not_fit_are_refused():
    staged, solutions = mask_denoiser()
    info, dense = copy.copy(staged.info), tiny_denoiser()
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"weight and mask of .* must be \(32, 128\), got \(2, 3\)"
    ):
        StagedDenoiser.assemble(dense, info, [{FF: MaskedState(mask, torch.ones(2, 3))}])
    layer = next(a for a in info.layers if FF in a.input_names)
    shrunk = LayerState(torch.arange(2), {})
    both = {layer.name: shrunk, FF: MaskedState(solutions[0][FF].mask, solutions[0][FF].weight)}
    with pytest.raises(ValueError, match=f"{FF} must not be masked where {layer.name} shrinks"):
        StagedDenoiser.assemble(dense, info, [both])
    adapter = adapter_for(dense)
    config = mosaicdiff.PruneConfig(granularity="unstructured")
    division = staged.division
    with pytest.raises(ValueError, match="solutions must be one for each of 1 stages, got 0"):
        assemble_weights(adapter, dense, division, [10], config, [])
    with pytest.raises(ValueError, match="steps must be one for each of 1 stages, got 2"):
        assemble_weights(adapter, dense, division, [5, 5], config, solutions)


def test_a_dense_linear_costs_what_it_did():
    staged, _ = mask_denoiser(shares=(0.9, 0.1))
    dense = tiny_denoiser()
    assert staged.macs() == [adapter_for(dense).macs(dense)] * 2


def test_report_of_masked_linears():
    staged, solutions = mask_denoiser(shares=(0.6, 0.2), only=[["*"], ["*.ff.net.2"]])
    stages = [
        StageReport(s.name, s.first, s.last, 10, share, 1, 1, [], weight_rows(solved))
        for s, share, solved in zip(staged.division.stages, (0.6, 0.2), solutions, strict=True)
    ]
    report = PruneReport(stages, 0.4, 1.0, 1, 1, 1.0, 1.0, 1, 1, 1.0, 1, 1, 1, 0.1)
    row = next(r for r in stages[0].weights if r.name == FF)
    assert row.shape == (32, 128) and row.removed == round(0.6 * 32 * 128) / (32 * 128)
    assert row.error == solutions[0][FF].error and row.damping == 0.01
    assert report_from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.weight_table().row_count == 18
    assert list(report.weight_table().columns[3].cells).count("whole") == 15
    assert report.stage_table().row_count == 2 and report.layer_table().row_count == 0
