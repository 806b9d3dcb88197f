"""A LoRA sliced by the plan is the dense model with the LoRA, cut afterwards."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mosaicdiff
from mosaicdiff.composition.lora import dense_shapes

from ..conftest import sample, tiny_batches, tiny_denoiser, tiny_pipeline
from ..cutting import pack
from ..family_cases import CASES
from ..test_families import call, staged_of, uneven

#: Families that the quick tests take: plain layers, packed linears, norms across heads.
QUICK = ("dit", "flux", "wan")

FAMILIES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.models) for name in CASES]


def random_lora(shapes, rank=3, seed=4, std=0.2, prefix="", alpha=None):
    """Matrices for every module, by peft's names."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module, shape in shapes.items():
        one = [1] * (len(shape) - 2)
        down = torch.randn(rank, *shape[1:], generator=generator).double() * std
        up = torch.randn(shape[0], rank, *one, generator=generator).double() * std
        found[f"{prefix}{module}.lora_A.weight"] = down
        found[f"{prefix}{module}.lora_B.weight"] = up
        if alpha is not None:
            found[f"{prefix}{module}.alpha"] = torch.tensor(float(alpha))
    return found


def shapes_of(model):
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, kinds)}


def with_lora(model, tensors, scale=1.0):
    """A copy of a dense model with a LoRA added to its weights."""
    model = copy.deepcopy(model)
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            weight = model.get_submodule(module).weight
            up = tensors[f"{module}.lora_B.weight"]
            change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            weight.data += scale * change.to(weight.dtype)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "drop", [(), ("heads",), ("neurons",)], ids=["uneven", "no heads", "no neurons"]
)
def test_sliced_lora_is_lora_then_cut(name, drop):
    case = CASES[name]
    dense = case.make().double().eval()
    plans = [uneven(dense), uneven(dense, drop), {}]
    staged = staged_of(dense, plans)
    before = {n: p.clone() for n, p in staged.state_dict().items()}
    original = copy.deepcopy(dense)
    lora = random_lora(shapes_of(dense))
    mosaicdiff.load_lora(staged, lora, scale=0.5)
    changed = with_lora(original, lora, 0.5)
    for plan, stage in zip(plans, staged.stage_models, strict=True):
        expected = call(pack(changed, plan), case)
        scale = expected.abs().max()
        assert (call(stage, case) - expected).abs().max() <= 1e-10 * scale
        assert (call(pack(original, plan), case) - expected).abs().max() > 1e-3 * scale
    mosaicdiff.unload_lora(staged)
    after = staged.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], tensor) for n, tensor in before.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_of_the_pruned_model_comes_back(name):
    case = CASES[name]
    dense = case.make().double().eval()
    staged = staged_of(dense, [uneven(dense)])
    stage = staged.stage_models[0]
    small = random_lora(
        {n: s for n, s in shapes_of(stage).items() if n in dense_shapes(staged)},
        prefix="transformer.",
    )
    wide = mosaicdiff.expand_lora(staged, small)
    assert wide.keys() == small.keys()
    shapes = shapes_of(dense)
    grown = 0
    for key, tensor in wide.items():
        axis = 0 if "lora_B" in key else 1
        module = key.removeprefix("transformer.").rpartition(".lora_")[0]
        assert tensor.shape[axis] == shapes[module][axis]
        grown += tensor.shape != small[key].shape
        gone = tensor.abs().flatten(1).sum(1) if axis == 0 else tensor.abs().sum(
            dim=[0, *range(2, tensor.ndim)]
        )  # fmt: skip
        assert (gone == 0).sum() == tensor.shape[axis] - small[key].shape[axis]
    assert grown
    # On the dense model, what the pruned one kept changes as it was trained: cut, it is that.
    bare = {key.removeprefix("transformer."): tensor for key, tensor in wide.items()}
    expected = with_lora(stage, {k.removeprefix("transformer."): v for k, v in small.items()})
    found = pack(with_lora(dense, bare), uneven(dense))
    for n, weight in expected.state_dict().items():
        assert torch.allclose(found.state_dict()[n], weight, rtol=0, atol=1e-14), n


@pytest.fixture
def pipe():
    pipe = tiny_pipeline(tiny_denoiser())
    config = mosaicdiff.PruneConfig(sparsity=0.4, samples=48, steps=20)
    mosaicdiff.prune(pipe, config, calibration=tiny_batches())
    return pipe


def lora_of(pipe, **options):
    return random_lora(dense_shapes(pipe.transformer), **options)


def difference(one, other):
    return abs(one - other).max()


def test_loras_add_up_and_leave_in_any_order(pipe):
    dense = sample(pipe)
    first, second = lora_of(pipe, seed=1), lora_of(pipe, seed=2)
    mosaicdiff.load_lora(pipe, first, adapter_name="first")
    alone = sample(pipe)
    assert difference(alone, dense) > 1e-3
    mosaicdiff.load_lora(pipe, second, adapter_name="second", scale=-0.5)
    both = sample(pipe)
    assert difference(both, alone) > 1e-3
    mosaicdiff.unload_lora(pipe, "first")
    mosaicdiff.load_lora(pipe, first, adapter_name="first")
    assert difference(both, sample(pipe)) < 1e-6
    mosaicdiff.unload_lora(pipe, "second")
    assert (sample(pipe) == alone).all()
    mosaicdiff.unload_lora(pipe)
    assert (sample(pipe) == dense).all()


def test_what_stages_share_is_changed_once_and_stays_shared(pipe):
    stages = pipe.transformer.stage_models
    name = "transformer_blocks.0.norm1.linear"
    shared = [stage.get_submodule(name).weight for stage in stages]
    assert all(weight is shared[0] for weight in shared)
    before = shared[0].clone()
    lora = {k: v for k, v in lora_of(pipe).items() if k.startswith(name)}
    mosaicdiff.load_lora(pipe, lora)
    down, up = lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"]
    assert torch.allclose(shared[0], before + (up @ down).float(), atol=1e-6)
    assert all(stage.get_submodule(name).weight is shared[0] for stage in stages)


def test_a_lora_is_saved_with_the_model(pipe, tmp_path):
    mosaicdiff.load_lora(pipe, lora_of(pipe))
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path / "model")
    loaded = type(pipe).from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    assert difference(sample(loaded), expected) < 1e-5


def test_single_weights_that_are_gone_stay_zero():
    pipe = tiny_pipeline(tiny_denoiser())
    config = mosaicdiff.PruneConfig(sparsity=0.5, granularity="unstructured", samples=48, steps=20)
    mosaicdiff.prune(pipe, config, calibration=tiny_batches())
    before = sample(pipe)
    mosaicdiff.load_lora(pipe, lora_of(pipe))
    assert difference(sample(pipe), before) > 1e-3
    (stage,), (masks,) = pipe.transformer.stage_models, pipe.transformer.masks
    assert masks
    for name, mask in masks.items():
        assert not stage.get_submodule(name).weight[~mask].any()


def test_half_precision_is_rounded_once(pipe):
    pipe.transformer.to(torch.bfloat16)
    name = "transformer_blocks.0.norm1.linear"
    weight = pipe.transformer.stage_models[0].get_submodule(name).weight
    before = weight.clone()
    lora = {k: v.float() for k, v in lora_of(pipe).items() if k.startswith(name)}
    mosaicdiff.load_lora(pipe, lora)
    change = lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
    assert torch.equal(weight, (before.float() + change).bfloat16())


def test_layouts_and_scales_of_files(pipe, tmp_path):
    lora = {k: v.float() for k, v in lora_of(pipe, rank=4).items() if "attn1.to_q" in k}
    mosaicdiff.load_lora(pipe, lora, scale=0.5)
    expected = sample(pipe)
    mosaicdiff.unload_lora(pipe)

    def renamed(a, b, extra=()):
        new = {k.replace("lora_A", a).replace("lora_B", b): v for k, v in lora.items()}
        return new | dict(extra)

    modules = {k.partition(".lora_")[0] for k in lora}
    halves = [(f"{m}.alpha", torch.tensor(2.0)) for m in modules]
    layouts = [
        ({f"transformer.{k}": v for k, v in lora.items()}, None, 0.5),
        ({f"base_model.model.{k}": v for k, v in lora.items()}, None, 0.5),
        (renamed("lora_A.default", "lora_B.default"), None, 0.5),
        (renamed("lora.down", "lora.up"), None, 0.5),
        (renamed("lora_down", "lora_up", halves), None, 1.0),
        (lora, {"transformer.r": 4, "transformer.lora_alpha": 2}, 1.0),
        (
            {f"transformer.{k}": v for k, v in lora.items()},
            {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn1.to_q": 2}},
            1.0,
        ),
        (lora, {"transformer.lora_alpha": 2, "transformer.use_rslora": True}, 0.5),
    ]
    for number, (tensors, settings, scale) in enumerate(layouts):
        file = tmp_path / str(number) / "lora.safetensors"
        file.parent.mkdir()
        metadata = {"lora_adapter_metadata": json.dumps(settings)} if settings else None
        save_file(tensors, file, metadata=metadata)
        mosaicdiff.load_lora(pipe, file.parent if number % 2 else file, scale=scale)
        assert difference(sample(pipe), expected) < 1e-6, number
        mosaicdiff.unload_lora(pipe)


def old_names(lora):
    return {
        k.replace("to_q.lora_A", "processor.to_q_lora.down").replace(
            "to_q.lora_B", "processor.to_q_lora.up"
        ): v
        for k, v in lora.items()
    }


def test_names_of_attention_processors(pipe):
    lora = {k: v for k, v in lora_of(pipe).items() if "attn1.to_q" in k}
    mosaicdiff.load_lora(pipe, lora)
    expected = sample(pipe)
    mosaicdiff.unload_lora(pipe)
    mosaicdiff.load_lora(pipe, old_names(lora))
    assert (sample(pipe) == expected).all()


Q = "transformer_blocks.0.attn1.to_q"
PAIR = {f"{Q}.lora_A.weight": torch.ones(2, 32), f"{Q}.lora_B.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "must change something of the denoiser, got nothing"),
        (PAIR | {f"{Q}.dora_scale": torch.ones(32)}, "got .*dora_scale: DoRA norms"),
        (PAIR | {f"{Q}.lokr_w1": torch.ones(2, 2)}, "LoKr is no product"),
        (PAIR | {f"{Q}.lora_B.bias": torch.ones(32)}, r"got .*lora_B\.bias\. Merge it"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 32)}, "must have two matrices, got down alone"),
        (PAIR | {"text_encoder.a.lora_A.weight": torch.ones(1)}, "load_lora_into_text_encoder"),
        ({k.replace("to_q", "to_x"): v for k, v in PAIR.items()}, "made for another model"),
        ({k: v[:16] for k, v in PAIR.items()}, r"dense model's \(32, 32\), got \(16, 2\)"),
    ],
)
def test_what_is_no_lora_of_this_model_is_refused_and_changes_nothing(pipe, tensors, message):
    before = {n: p.clone() for n, p in pipe.transformer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        mosaicdiff.load_lora(pipe, tensors)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[n], tensor) for n, tensor in before.items())
    with pytest.raises(ValueError, match="a LoRA must be loaded, got none"):
        mosaicdiff.unload_lora(pipe)


def test_models_that_cannot_take_one_are_refused(pipe, tmp_path):
    mosaicdiff.load_lora(pipe, PAIR)
    with pytest.raises(ValueError, match="adapter_name must be new, got 'default' again"):
        mosaicdiff.load_lora(pipe, PAIR)
    with pytest.raises(ValueError, match="a LoRA 'other' must be loaded, got default"):
        mosaicdiff.unload_lora(pipe, "other")
    mosaicdiff.unload_lora(pipe)
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        mosaicdiff.load_lora(pipe, PAIR, scale=float("nan"))
    with pytest.raises(ValueError, match=r"must be a \.safetensors file or a folder"):
        mosaicdiff.load_lora(pipe, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match=r"must hold one \.safetensors file, got none"):
        mosaicdiff.load_lora(pipe, tmp_path)
    with pytest.raises(ValueError, match="pipeline must hold a pruned denoiser, got none"):
        mosaicdiff.load_lora(tiny_pipeline(tiny_denoiser()), PAIR)
    with pytest.raises(ValueError, match=r"Call mosaicdiff\.load_lora\(pipe"):
        pipe.transformer.load_lora_adapter(PAIR)
    pipe.transformer.stage_models[0].pos_embed.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="must be of 16 or 32 bits, but it is quantised"):
        mosaicdiff.load_lora(pipe, PAIR)


def test_expanding_needs_the_stage(pipe):
    with pytest.raises(ValueError, match=r"stage must be one of 0\.\.2, got None"):
        mosaicdiff.expand_lora(pipe, PAIR)
    with pytest.raises(ValueError, match=r"stage must be one of 0\.\.2, got 7"):
        mosaicdiff.expand_lora(pipe, PAIR, stage=7)
    stage = pipe.transformer.stage_models[1]
    shapes = {n: s for n, s in shapes_of(stage).items() if n in dense_shapes(pipe.transformer)}
    named = random_lora(shapes, prefix="base_model.model.stage_models.1.")
    assert mosaicdiff.expand_lora(pipe, named)
    with pytest.raises(ValueError, match="must be as wide as stage 0's"):
        mosaicdiff.expand_lora(pipe, random_lora(shapes), stage=0)
    with pytest.raises(ValueError, match="made for another model"):
        mosaicdiff.expand_lora(pipe, random_lora({"other": (3, 3)}), stage=0)
