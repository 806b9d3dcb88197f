"""A packed model is the dense one with the removed columns zeroed, exactly."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mosaicdiff.adapters import adapter_for
from mosaicdiff.groups import Columns, PrunableLayer, Rows
from mosaicdiff.pack import BiasOnly

from .conftest import tiny_denoiser
from .cutting import pack, zeroed

UNEVEN = {
    "transformer_blocks.0.attn1": [0, 3],
    "transformer_blocks.0.ff": list(range(0, 128, 3)),
    "transformer_blocks.1.attn1": [],
    "transformer_blocks.1.ff": [5, 77],
    "transformer_blocks.2.attn1": [1, 2, 3],
    "transformer_blocks.2.ff": [],
}


@pytest.mark.parametrize(
    "kept",
    [
        UNEVEN,
        {"transformer_blocks.1.attn1": []},
        {"transformer_blocks.0.ff": [127]},
        {f"transformer_blocks.{i}.{part}": [] for i in range(3) for part in ("attn1", "ff")},
        {},
    ],
    ids=["uneven", "no heads", "one neuron", "nothing left", "whole"],
)
def test_packed_equals_zeroed(kept):
    dense = tiny_denoiser().double()
    inputs = (
        torch.randn(3, 2, 8, 8).double(),
        torch.tensor([9, 500, 999]),
        torch.tensor([1, 2, 3]),
    )
    expected = zeroed(dense, kept)(*inputs).sample
    assert (pack(dense, kept)(*inputs).sample - expected).abs().max() <= 1e-10
    if kept:
        assert (dense(*inputs).sample - expected).abs().max() > 1e-4


def test_slices_are_bit_equal_and_the_dense_model_is_untouched():
    dense = tiny_denoiser()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    packed = pack(dense, UNEVEN)
    heads = torch.cat([torch.arange(8), torch.arange(24, 32)])
    q = "transformer_blocks.0.attn1.to_q"
    assert torch.equal(packed.get_submodule(q).weight, dense.get_submodule(q).weight[heads])
    assert torch.equal(packed.get_submodule(q).bias, dense.get_submodule(q).bias[heads])
    assert packed.transformer_blocks[0].attn1.heads == 2
    assert dense.transformer_blocks[0].attn1.heads == 4
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


def test_what_is_not_pruned_is_the_same_object():
    dense = tiny_denoiser()
    packed = pack(dense, {"transformer_blocks.0.ff": [1]})
    assert packed.transformer_blocks[1] is dense.transformer_blocks[1]
    assert packed.transformer_blocks[0].attn1 is dense.transformer_blocks[0].attn1
    assert packed.pos_embed is dense.pos_embed
    assert packed.transformer_blocks[0].ff is not dense.transformer_blocks[0].ff


def test_a_hook_on_one_stage_is_not_on_the_others():
    dense, calls = tiny_denoiser(), []
    stages = [pack(dense, UNEVEN) for _ in range(2)]
    stages[0].register_forward_pre_hook(lambda module, args: calls.append("first"))
    stages[1](torch.randn(1, 2, 8, 8), torch.tensor([9]), torch.tensor([1]))
    assert calls == []


def test_forgetting_the_head_count_is_caught():
    dense = tiny_denoiser()
    dense.transformer_blocks[1].attn1.heads = 2
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn1 must have 8 rows a head"):
        adapter_for(dense).check(dense)


def test_bias_only_without_a_bias_gives_zeros():
    assert BiasOnly(5, None)(torch.randn(2, 3, 4)).shape == (2, 3, 5)
    assert not BiasOnly(5, None)(torch.randn(2, 3, 4)).any()


def test_narrow_takes_all_rows_of_a_group():
    layer = PrunableLayer("a", "heads", (Columns("r"),), (Rows("w"),), 3, 2, 1)
    groups = torch.tensor([0, 2])
    weight = torch.arange(6.0)[:, None]
    pieces = {piece.name: piece for piece in layer.pieces}
    taken = layer.narrow(pieces["w.weight"], weight, groups)
    assert taken.flatten().tolist() == [0, 1, 4, 5]
    taken = layer.narrow(pieces["r.weight"], weight.T, groups)
    assert taken.flatten().tolist() == [0, 1, 4, 5]
    assert layer.narrow(pieces["r.bias"], torch.ones(4), groups).tolist() == [1] * 4


def test_narrow_takes_both_halves_of_a_gated_writer():
    layer = PrunableLayer("a", "neurons", (Columns("r"),), (Rows("w", (0, 3)),), 3, 1, 1)
    (piece, *_) = layer.pieces
    taken = layer.narrow(piece, torch.arange(6.0), torch.tensor([0, 2]))
    assert taken.tolist() == [0, 2, 3, 5]
    assert layer.narrow(piece, taken, torch.tensor([1])).tolist() == [2, 5]


def test_narrow_puts_kept_groups_first_where_all_rows_stay():
    layer = PrunableLayer("a", "heads", (Columns("r"),), (Rows("w", whole=True),), 3, 2, 1)
    (piece, *_) = layer.pieces
    taken = layer.narrow(piece, torch.arange(6.0), torch.tensor([1]))
    assert taken.tolist() == [2, 3, 0, 1, 4, 5]


@pytest.mark.parametrize("kept", [{}, UNEVEN], ids=["dense", "packed"])
def test_macs_equal_the_flop_counter(kept):
    model = pack(tiny_denoiser(), kept).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(
            torch.empty(1, 2, 8, 8, device="meta"),
            torch.empty(1, dtype=torch.long, device="meta"),
            torch.empty(1, dtype=torch.long, device="meta"),
        )
    assert counter.get_total_flops() == 2 * adapter_for(model).macs(model).total


def test_macs_of_dit_xl_2():
    from mosaicdiff.evaluate.configurations import configuration

    macs = adapter_for(tiny_denoiser()).macs(configuration("dit-xl-2").empty())
    assert round(macs.total / 1e9, 2) == 118.67
    assert round(macs.linear / 1e9, 2) == 114.44


class OtherLinear(nn.Linear):
    """Stands where a quantiser would put a layer of its own."""


def fuse(model):
    model.transformer_blocks[0].attn1.fused_projections = True


def quantise(model):
    model.transformer_blocks[0].ff.net[2] = OtherLinear(128, 32)


def load_lora(model):
    model.transformer_blocks[0].ff.net[2].lora_A = nn.ModuleDict()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (fuse, "unfuse_qkv_projections"),
        (quantise, r"ff\.net\.2 must be torch\.nn\.Linear, got OtherLinear"),
        (load_lora, r"adapter \(LoRA\) is loaded"),
    ],
)
def test_states_that_cannot_be_pruned_are_refused(spoil, message):
    model = tiny_denoiser()
    spoil(model)
    with pytest.raises(ValueError, match=message):
        adapter_for(model).check(model)


def test_an_unknown_denoiser_is_refused():
    with pytest.raises(ValueError, match="must be one of DiTTransformer2DModel, .*got Linear"):
        adapter_for(nn.Linear(2, 2))
