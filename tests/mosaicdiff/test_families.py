"""What every family owes: cut layers are zeroed layers, and all that follows from it."""

import copy
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from mosaicdiff import PruneConfig, StagedDenoiser
from mosaicdiff.adapters import adapter_for
from mosaicdiff.adapters.common import check_fit, check_plain
from mosaicdiff.adapters.family import Heads
from mosaicdiff.stage_state import StageInfo
from mosaicdiff.trajectory.schedule import NoiseSchedule
from mosaicdiff.trajectory.stages import Division

from .cutting import pack, states_of, zeroed
from .family_cases import CASES

pytestmark = pytest.mark.models


def uneven(model, drop=()):
    """Kept groups that differ from layer to layer; those of `drop` keep none."""
    kept = {}
    for index, layer in enumerate(adapter_for(model).layers(model)):
        groups = list(range(layer.groups))
        stays = [g for g in groups if (g + index) % 3 != index % 2] or groups[-1:]
        kept[layer.name] = [] if layer.kind in drop else stays
    return kept


def call(model, case, dtype=torch.float64):
    latents, timesteps, inputs = case.batch()
    adapter = getattr(model, "adapter", None) or adapter_for(model)
    with torch.no_grad(), _in_double(dtype):
        return adapter.predict(model, latents.to(dtype), timesteps, inputs)


@contextmanager
def _in_double(dtype):
    """Keep in float64 what a model computes in float32, whatever it is given."""
    if dtype != torch.float64:
        yield
        return
    to = torch.Tensor.to

    def wide(tensor, *args, **kwargs):
        narrows = tensor.dtype == torch.float64 and torch.float32 in args
        return tensor if narrows else to(tensor, *args, **kwargs)

    def same(tensor):
        return wide(tensor, torch.float32)

    with patch.object(torch.Tensor, "float", same), patch.object(torch.Tensor, "to", wide):
        yield


def _fused(model):
    return any(getattr(m, "fused_projections", False) for m in model.modules())


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def dense(case):
    return case.make().double().eval()


def staged_of(dense, kept_of_stages):
    adapter = adapter_for(dense)
    schedule = NoiseSchedule.named("linear")
    starts = [700, 300][: len(kept_of_stages) - 1]
    states = [states_of(dense, kept) for kept in kept_of_stages]
    info = StageInfo(
        base_class=adapter.denoiser_class,
        base_config={k: v for k, v in dense.config.items() if not k.startswith("_")},
        division=Division.at_timesteps(schedule, starts),
        layers=adapter.layers(dense),
        kept=[{name: s.kept for name, s in row.items()} for row in states],
        steps=[1] * len(states),
        prune_config=PruneConfig().to_dict(),
    )
    return StagedDenoiser.assemble(dense, info, states)


@pytest.mark.parametrize(
    "drop",
    [(), ("heads",), ("neurons",), ("heads", "neurons")],
    ids=lambda d: "+".join(d) or "none",
)
def test_cut_equals_zeroed(case, dense, drop):
    before = {name: p.clone() for name, p in dense.state_dict().items()}
    kept = uneven(dense, drop)
    expected = call(zeroed(dense, kept), case)
    assert (call(pack(dense, kept), case) - expected).abs().max() <= 1e-9
    assert (call(dense, case) - expected).abs().max() > 1e-4  # what was removed counts
    after = dense.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_costs_are_what_cutting_saves(case, dense):
    adapter, kept = adapter_for(dense), uneven(dense)
    saved = adapter.macs(dense).linear - adapter.macs(pack(dense, kept)).linear
    products = adapter.macs(dense).attention - adapter.macs(pack(dense, kept)).attention
    gone = {row.name: row.groups - len(kept[row.name]) for row in adapter.layers(dense)}
    layers = adapter.layers(dense)
    assert saved == sum(row.cost * gone[row.name] for row in layers)
    assert products == sum(row.products * gone[row.name] for row in layers)


def test_fused_afterwards_equals_unfused(case, dense):
    kept = uneven(dense)
    packed = pack(dense, kept)
    expected = call(packed, case)
    if not hasattr(packed, "fuse_qkv_projections"):
        pytest.skip("diffusers does not fuse the projections of this model")
    if case.fuses is not None:
        with pytest.raises((ValueError, RuntimeError, AttributeError), match=case.fuses):
            fused = copy.deepcopy(packed)
            fused.fuse_qkv_projections()
            call(fused, case)
        return
    packed.fuse_qkv_projections()
    if not _fused(packed):
        dense.fuse_qkv_projections()
        assert not _fused(dense)
        pytest.skip("diffusers does not fuse the projections of this model, cut or not")
    assert (call(packed, case) - expected).abs().max() <= 1e-9


def test_saved_loaded_and_cast(case, dense, tmp_path):
    stages = [uneven(dense), {}, uneven(dense, ("neurons",))]
    staged = staged_of(dense, stages)
    staged.save_pretrained(tmp_path / "m")
    loaded = StagedDenoiser.from_pretrained(tmp_path / "m", torch_dtype=torch.float64)
    for mine, theirs in zip(staged.stage_models, loaded.stage_models, strict=True):
        own, other = mine.state_dict(), theirs.state_dict()
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)
        assert (call(mine, case) - call(theirs, case)).abs().max() <= 1e-12
    loaded.save_pretrained(tmp_path / "again")
    first, second = (
        (tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("m", "again")
    )
    assert first.read_bytes() == second.read_bytes()
    half = StagedDenoiser.from_pretrained(tmp_path / "m", torch_dtype=torch.bfloat16)
    kept = half.adapter.float32_modules
    for name, parameter in half.named_parameters():
        whole = not kept.isdisjoint(name.split("."))
        assert parameter.dtype == (torch.float32 if whole else torch.bfloat16), name
    assert torch.isfinite(call(half.stage_models[0], case, torch.bfloat16)).all()


def test_one_stage_compiles_whole(case, dense):
    packed = pack(dense.float(), uneven(dense))
    expected = call(packed, case, torch.float32)
    torch._dynamo.reset()
    packed.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(call(packed, case, torch.float32), expected, rtol=1e-4, atol=1e-5)


def test_forgetting_an_attribute_is_caught(case, dense):
    """Each integer that a smaller module must be told is missed where it is not."""
    adapter = adapter_for(dense)
    layers = {layer.name: layer for layer in adapter.layers(dense)}
    kept, checked = uneven(dense), set()
    for layer in layers.values():
        for name, units in layer.attributes:
            if (type(dense.get_submodule(layer.home)), name) in checked:
                continue
            checked.add((type(dense.get_submodule(layer.home)), name))
            packed = pack(dense, {layer.name: kept[layer.name]})
            setattr(packed.get_submodule(layer.home), name, layer.groups * units)
            with pytest.raises(ValueError, match="Was it pruned by other means"):
                check_fit(packed, layer, len(kept[layer.name]))
            with pytest.raises(ValueError, match="prune: "):  # and as a dense one it is refused
                check_plain(packed, adapter.layers(packed))
    assert checked or not any(layer.kind == "heads" for layer in layers.values())


def test_an_undeclared_attribute_is_caught(case, dense, monkeypatch):
    """A declaration that leaves an integer out is refused before anything is cut."""
    adapter = adapter_for(dense)
    kinds = list(adapter.block_kinds)
    number, kind = next(
        (n, k) for n, k in enumerate(kinds) if any(isinstance(s, Heads) for s in k.layers)
    )
    spec = next(s for s in kind.layers if isinstance(s, Heads))
    for name in spec.per_group:
        left = tuple(other for other in spec.per_group if other != name)
        changed = replace(spec, per_group=left)
        layers = tuple(changed if s is spec else s for s in kind.layers)
        kinds[number] = replace(kind, layers=layers)
        monkeypatch.setattr(type(adapter), "block_kinds", tuple(kinds))
        with pytest.raises(ValueError, match=f"{name} must be declared by its family"):
            adapter.layers(dense)


@pytest.mark.parametrize("drop", [("heads",), ("heads", "neurons")], ids="+".join)
def test_what_no_stage_keeps_is_saved_too(case, dense, drop, tmp_path):
    """Layers that are gone from every stage leave no file that cannot be read."""
    staged = staged_of(dense, [uneven(dense, drop), uneven(dense, drop)])
    staged.save_pretrained(tmp_path / "m")
    loaded = StagedDenoiser.from_pretrained(tmp_path / "m", torch_dtype=torch.float64)
    for mine, theirs in zip(staged.stage_models, loaded.stage_models, strict=True):
        assert (call(mine, case) - call(theirs, case)).abs().max() <= 1e-12
