"""Every family with a published layout: cut unevenly, written in it, read back."""

import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file

from mosaicdiff import load_single_file, save_single_file

from .family_cases import CASES
from .single_files import (
    flux_tensors,
    ltx_tensors,
    sana_tensors,
    sd3_tensors,
    unet_tensors,
    wan_tensors,
    with_width,
    write_single_file,
)
from .single_files_joint import flux2_tensors, hunyuan_tensors
from .test_families import call, staged_of, uneven

pytestmark = pytest.mark.models

WRITERS = {
    "sd3": sd3_tensors,
    "sd3.5": sd3_tensors,
    "flux": flux_tensors,
    "flux-schnell": flux_tensors,
    "sd1.5": lambda state: unet_tensors(state, layers=1),
    "sdxl": lambda state: unet_tensors(state, layers=1),
    "wan": wan_tensors,
    "wan-picture": wan_tensors,
    "flux.2": flux2_tensors,
    "hunyuan-video": hunyuan_tensors,
    "qwen-image": dict,
    "sana": sana_tensors,
    "ltx": ltx_tensors,
}


@pytest.fixture(params=WRITERS)
def case(request, monkeypatch):
    if request.param in ("flux", "flux-schnell", "hunyuan-video"):
        model = CASES[request.param].make()
        entry = SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]
        width = model.single_transformer_blocks[0].attn.to_q.in_features
        monkeypatch.setitem(
            entry, "checkpoint_mapping_fn", with_width(entry["checkpoint_mapping_fn"], width)
        )
    return request.param


def cut(name, stages: int, refit: bool):
    """A denoiser in stages that keep different groups; with readers of their own where `refit`."""
    dense = CASES[name].make()
    kept = [uneven(dense) for _ in range(stages)]
    for number, row in enumerate(kept):
        for index, groups in enumerate(row):
            if (index + number) % 3 == 0 and len(row[groups]) > 1:
                row[groups] = row[groups][1:]
    staged = staged_of(dense, kept)
    if refit:
        for number, stage in enumerate(staged.stage_models):
            for layer in staged.info.layers:
                for reader in layer.readers:
                    module = stage.get_submodule(reader.module)
                    module.weight.data = module.weight.data * (1 + number / 8)
    return staged


@pytest.mark.parametrize("stages, refit", [(1, True), (3, False), (3, True)])
def test_cut_and_read_back_is_the_same(case, tmp_path, stages, refit):
    staged = cut(case, stages, refit)
    dense = CASES[case].make()
    source = write_single_file(tmp_path / "dense.safetensors", WRITERS[case](dense.state_dict()))
    save_single_file(staged, tmp_path / "pruned.safetensors", source=source)
    back = load_single_file(tmp_path / "pruned.safetensors")
    for ours, theirs in zip(staged.stage_models, back.stage_models, strict=True):
        before, after = ours.state_dict(), theirs.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(*(call(model, CASES[case], torch.float32) for model in (staged, back)))
    names, held = load_file(source), load_file(tmp_path / "pruned.safetensors")
    if stages == 1:
        assert held.keys() == names.keys()
        assert any(held[name].shape != names[name].shape for name in names)
    elif not refit:
        assert held.keys() == names.keys()  # nothing differs between the stages
    else:
        own = {n.split(".", 3)[3] for n in held if n.startswith("mosaicdiff.stage.1.")}
        assert own and own <= set(names)


def test_what_diffusers_does_not_convert_is_refused(tmp_path):
    """diffusers leaves the norms of Sana 1.5 in the file, for itself too."""
    dense = CASES["sana1.5"].make()
    source = write_single_file(tmp_path / "dense.safetensors", sana_tensors(dense.state_dict()))
    with pytest.raises(ValueError, match="must hold .*norm_q.weight.*is pruned as a folder"):
        save_single_file(cut("sana1.5", 1, True), tmp_path / "pruned.safetensors", source=source)


def test_packed_linears_of_flux_keep_their_order(tmp_path, monkeypatch):
    """Rows of linear1 are q, k, v and the MLP; columns of linear2 attention and the MLP."""
    entry = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    convert = with_width(entry["checkpoint_mapping_fn"], CASES["flux"].make().inner_dim)
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", convert)
    staged = cut("flux", 1, True)
    dense = CASES["flux"].make()
    source = write_single_file(tmp_path / "dense.safetensors", flux_tensors(dense.state_dict()))
    save_single_file(staged, tmp_path / "pruned.safetensors", source=source)
    held = load_file(tmp_path / "pruned.safetensors")
    block = staged.stage_models[0].single_transformer_blocks[1]
    rows = [getattr(block.attn, f"to_{letter}").weight for letter in "qkv"]
    assert torch.equal(
        held["single_blocks.1.linear1.weight"], torch.cat([*rows, block.proj_mlp.weight])
    )
    assert torch.equal(held["single_blocks.1.linear2.weight"], block.proj_out.weight)
