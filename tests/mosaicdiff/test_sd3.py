"""SD3: heads leave both streams at once, exactly, and what is left is a smaller SD3."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mosaicdiff import PruneConfig, StagedDenoiser
from mosaicdiff.adapters import adapter_for
from mosaicdiff.adapters.joint import JointBiasOnly, JointBiasOnlyBlock
from mosaicdiff.adapters.sd3 import TEXT_TOKENS
from mosaicdiff.allocation.planning import make_frame
from mosaicdiff.pack import dense_parts
from mosaicdiff.stage_state import StageInfo
from mosaicdiff.statistics.depth import measure_changes
from mosaicdiff.statistics.noising import CalibrationSet, draw_noisy
from mosaicdiff.surgery import Surgeon
from mosaicdiff.trajectory.probe import Probe

from .conftest import flow_scheduler, tiny_sd3, tiny_sd3_batches
from .cutting import pack, states_of, zeroed

#: SD3 itself, and SD3.5 with a second attention in the first and the last block.
KINDS = {
    "sd3": {"dual": (), "qk_norm": None},
    "sd3.5": {"dual": (0, 2), "qk_norm": "rms_norm"},
    "dual without norm": {"dual": (1,), "qk_norm": None},
}
BLOCK = "transformer_blocks"
UNEVEN = {
    f"{BLOCK}.0.attn": [0, 3],
    f"{BLOCK}.0.attn2": [1, 2, 3],
    f"{BLOCK}.0.ff": list(range(0, 128, 3)),
    f"{BLOCK}.0.ff_context": [5, 77],
    f"{BLOCK}.1.attn": [2],
    f"{BLOCK}.1.attn2": [],
    f"{BLOCK}.1.ff": [],
    f"{BLOCK}.1.ff_context": [0],
    f"{BLOCK}.2.attn": [0, 1, 3],
    f"{BLOCK}.2.attn2": [3],
    f"{BLOCK}.2.ff": [1, 2, 3],
}
NO_HEADS = {f"{BLOCK}.{i}.{part}": [] for i in range(3) for part in ("attn", "attn2")}
NO_NEURONS = {f"{BLOCK}.{i}.{part}": [] for i in range(3) for part in ("ff", "ff_context")}
KEPT = {
    "uneven": UNEVEN,
    "no heads": NO_HEADS,
    "no neurons": NO_NEURONS,
    "nothing left": NO_HEADS | NO_NEURONS,
    # What the text stream becomes matters only where later blocks still attend to it.
    "no heads at first": {f"{BLOCK}.0.attn": []},
    "nothing left at first": {k: v for k, v in (NO_HEADS | NO_NEURONS).items() if ".0." in k},
    "whole": {},
}


def call(model, dtype=torch.float64, timestep=640.0):
    _, inputs = tiny_sd3_batches(2)[0]
    latents = torch.randn(2, 2, 8, 8, generator=torch.manual_seed(5)).to(dtype)
    steps = torch.full((2,), timestep)
    adapter = getattr(model, "adapter", None) or adapter_for(model)
    with torch.no_grad():
        return adapter.predict(model, latents, steps, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_in_network_order_and_the_last_text_stream_ends(kind):
    model = tiny_sd3(**KINDS[kind])
    layers = adapter_for(model).layers(model)
    called = []
    for layer in layers:
        model.get_submodule(layer.readers[0].module).register_forward_hook(
            lambda module, args, output, name=layer.name: called.append(name)
        )
    call(model, torch.float32)
    assert called == [layer.name for layer in layers]
    joint = [layer for layer in layers if layer.name.endswith(".attn")]
    assert [len(layer.readers) for layer in joint] == [2, 2, 1]
    assert all(len(layer.writers) == 6 for layer in joint)
    assert not any("2.ff_context" in layer.name for layer in layers)
    dual = {int(n.name.split(".")[1]) for n in layers if n.name.endswith(".attn2")}
    assert dual == set(KINDS[kind]["dual"])


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_zeroed_in_both_streams(kind, kept):
    dense = tiny_sd3(**KINDS[kind]).double()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    expected = call(zeroed(tiny_sd3(**KINDS[kind]).double(), kept))
    assert (call(pack(dense, kept)) - expected).abs().max() <= 1e-10
    if kept:
        assert (call(dense) - expected).abs().max() > 1e-3
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


@pytest.mark.parametrize("name", ["attn", "attn2", "ff", "ff_context"])
def test_each_layer_alone_matters_and_is_exact(name):
    kept = {f"{BLOCK}.0.{name}": UNEVEN[f"{BLOCK}.0.{name}"]}
    dense = tiny_sd3().double()
    expected = call(zeroed(tiny_sd3().double(), kept))
    assert (call(pack(dense, kept)) - expected).abs().max() <= 1e-10
    assert (call(dense) - expected).abs().max() > 1e-3


def test_zeroing_one_stream_only_is_something_else():
    """The columns of `to_add_out` count: pruning is not the zeroing of `to_out.0` alone."""
    kept = {f"{BLOCK}.0.attn": [0, 3]}
    half = tiny_sd3().double()
    half.transformer_blocks[0].attn.to_out[0].weight.data[:, 8:24] = 0
    assert (call(half) - call(zeroed(tiny_sd3().double(), kept))).abs().max() > 1e-4


def test_forgetting_the_head_count_is_caught():
    dense = tiny_sd3(**KINDS["sd3"]).double()
    kept = {f"{BLOCK}.1.attn": [0, 3]}
    packed = pack(dense, kept)
    right = call(packed)
    packed.transformer_blocks[1].attn.heads = 4
    assert (call(packed) - right).abs().max() > 1e-4  # it runs, and is wrong
    adapter = adapter_for(packed)
    with pytest.raises(ValueError, match=r"1\.attn must have 8 rows a head, got 16 rows of to_q"):
        adapter.check(packed)


def test_replacing_writers_of_one_stream_only_is_caught():
    dense = tiny_sd3()
    layers = adapter_for(dense).layers(dense)
    states = states_of(dense, {layers[0].name: [0]})
    parts, whole = states[layers[0].name].parts, dense_parts(dense, layers[0])
    parts |= {name: whole[name] for name in parts if ".add_k_proj" in name}
    with pytest.raises(ValueError, match="got 32 rows of add_k_proj for 1 heads"):
        Surgeon(adapter_for(dense), layers).build(dense, states)


def test_what_the_processor_reads_is_what_is_left():
    packed = pack(tiny_sd3(), UNEVEN)
    attention = packed.transformer_blocks[0].attn
    assert (attention.heads, attention.sliceable_head_dim) == (2, 2)
    assert (attention.inner_dim, attention.inner_kv_dim) == (16, 16)
    assert attention.to_add_out.in_features == attention.add_k_proj.out_features == 16
    assert packed.config.num_attention_heads == 4  # the residual width comes from it


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_inverse_of_replace(kind):
    dense = tiny_sd3(**KINDS[kind])
    adapter = adapter_for(dense)
    surgeon = Surgeon(adapter, adapter.layers(dense))
    for kept in (UNEVEN, NO_HEADS | NO_NEURONS):
        packed, states = pack(dense, kept), states_of(dense, kept)
        groups = {name: state.kept for name, state in states.items()}
        for layer in adapter.layers(dense):
            given = states[layer.name].parts
            found = surgeon.parts(packed, layer, groups)
            if kept[layer.name]:
                assert found.keys() == given.keys()
            else:
                assert set(found) == {f"{reader.module}.bias" for reader in layer.readers}
            assert all(torch.equal(found[name], given[name]) for name in found)


def test_a_block_of_which_nothing_is_left_is_its_biases():
    packed = pack(tiny_sd3(), NO_HEADS | NO_NEURONS)
    assert all(isinstance(block, JointBiasOnlyBlock) for block in packed.transformer_blocks)
    partly = pack(tiny_sd3(), NO_HEADS)
    assert all(isinstance(block.attn, JointBiasOnly) for block in partly.transformer_blocks)


def assemble(dense, stages):
    """A staged denoiser that keeps these groups in each stage."""
    adapter = adapter_for(dense)
    frame = make_frame(flow_scheduler(), PruneConfig(steps=9, stages=len(stages)))
    states = [states_of(dense, kept) for kept in stages]
    info = StageInfo(
        base_class="SD3Transformer2DModel",
        base_config={k: v for k, v in dense.config.items() if not k.startswith("_")},
        division=frame.division,
        layers=adapter.layers(dense),
        kept=[{name: state.kept for name, state in row.items()} for row in states],
        steps=list(frame.steps),
        prune_config=PruneConfig().to_dict(),
    )
    return StagedDenoiser.assemble(dense, info, states)


@pytest.mark.parametrize(
    "stages",
    [
        [UNEVEN, NO_HEADS | NO_NEURONS, {}],
        [UNEVEN, UNEVEN, NO_HEADS],
        [NO_HEADS, NO_HEADS | NO_NEURONS, NO_HEADS],
        [UNEVEN],
    ],
    ids=["mixed", "no stage whole", "no heads anywhere", "one"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_bit_equal(kind, stages, tmp_path):
    staged = assemble(tiny_sd3(**KINDS[kind]), stages)
    staged.save_pretrained(tmp_path / "m")
    loaded = StagedDenoiser.from_pretrained(tmp_path / "m")
    for t in (995.0, 700.0, 20.0):
        assert torch.equal(call(staged, torch.float32, t), call(loaded, torch.float32, t))
    loaded.save_pretrained(tmp_path / "again")
    first, second = (
        (tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("m", "again")
    )
    assert first == second


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("kind", KINDS)
def test_macs_equal_the_flop_counter(kind, kept):
    dense = tiny_sd3(**KINDS[kind])
    adapter = adapter_for(dense)
    packed = pack(dense, kept)
    meta = pack(dense, kept).to("meta")
    inputs = adapter.example_inputs(meta, 1, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        adapter.predict(
            meta, torch.empty(1, 2, 8, 8, device="meta"), torch.empty(1, device="meta"), inputs
        )
    by_kind = counter.get_flop_counts()["Global"]
    # Linears are mm and addmm; on `meta` attention is two bmm.
    products = sum(n for name, n in by_kind.items() if str(name) in ("aten.bmm", "aten.baddbmm"))
    macs = adapter.macs(packed)
    assert (counter.get_total_flops() - products, products) == (2 * macs.linear, 2 * macs.attention)
    if kept:
        gone = [
            (layer, layer.groups - len(kept.get(layer.name, range(layer.groups))))
            for layer in adapter.layers(dense)
        ]
        whole = adapter.macs(dense)
        saved = sum(n * layer.cost for layer, n in gone)
        if isinstance(packed.transformer_blocks[-1], JointBiasOnlyBlock):
            saved += packed.transformer_blocks[-1].norm1_context.linear.weight.numel()
        assert whole.linear - macs.linear == saved
        assert whole.attention - macs.attention == sum(n * layer.products for layer, n in gone)


def test_macs_of_sd3_medium():
    """24 blocks of 24 heads of 64, 4096 image tokens, on the meta device."""
    adapter = adapter_for(tiny_sd3())
    medium = adapter.empty(
        {
            "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        }
    )  # fmt: skip
    assert adapter.tokens(medium)["text"] == TEXT_TOKENS == 77 + 256
    assert sum(p.numel() for p in medium.parameters()) == 2028328000
    macs = adapter.macs(medium)
    tokens = 4096 + TEXT_TOKENS
    assert macs.attention == 24 * 2 * tokens**2 * 1536
    inputs = adapter.example_inputs(medium, 1, torch.device("meta"))
    latents = torch.empty(1, 16, 128, 128, device="meta")
    with FlopCounterMode(display=False) as counter:
        adapter.predict(medium.to("meta"), latents, torch.empty(1, device="meta"), inputs)
    assert counter.get_total_flops() == 2 * macs.total


def test_targets_that_share_an_input_are_given_one():
    model = tiny_sd3()
    targets = adapter_for(model).targets(model)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    in_blocks = {n for n in linears if n.startswith(BLOCK) and "norm" not in n}
    assert {target.name for target in targets} == in_blocks and len(targets) == len(in_blocks)
    seen = {}
    for target in targets:
        model.get_submodule(target.name).register_forward_pre_hook(
            lambda module, args, name=target.name: seen.__setitem__(name, args[0])
        )
    call(model, torch.float32)
    for before, target in zip(targets, targets[1:], strict=False):
        shared = target.source != target.name
        assert (seen[before.name] is seen[target.name]) == shared
        assert seen[target.name] is seen[target.source]
        assert not shared or before.source == target.source


def test_changes_of_the_streams_are_those_of_both():
    """Image and text tokens count together; a block's change is its output less its input."""
    model = tiny_sd3()
    adapter, config = adapter_for(model), PruneConfig(samples=24, steps=12, batch_size=24)
    frame = make_frame(flow_scheduler(), config)
    stages, layers = frame.division.stages[:1], adapter.layers(model)
    data = CalibrationSet(tiny_sd3_batches(), adapter, model)
    changes = measure_changes(model, adapter, layers, stages, frame.schedule, data, config)[0]
    assert set(changes["error"]) == {layer.name for layer in layers} | set(adapter.blocks(model))
    generator = torch.Generator().manual_seed(stages[0].first + 2)
    ((latents, steps, inputs),) = draw_noisy(
        model, adapter, stages[0], frame.schedule, data, config, generator, samples=24
    )
    calls = {}
    for name, module in model.named_modules():

        def keep(module, args, kwargs, output, name=name):
            calls[name] = (kwargs, output)

        module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        adapter.predict(model, latents, steps, inputs)
    for index, name in enumerate(adapter.blocks(model)):
        given, (text, image) = calls[name]
        gates, (attended, text_attended) = calls[f"{name}.norm1"][1], calls[f"{name}.attn"][1]
        change = [image - given["hidden_states"]]
        attention = [gates[1][:, None] * attended]
        if index < 2:
            change.append(text - given["encoder_hidden_states"])
            text_gates = calls[f"{name}.norm1_context"][1]
            attention.append(text_gates[1][:, None] * text_attended)
        for key, rows in {name: change, f"{name}.attn": attention}.items():
            expected = torch.cat(rows, dim=1).square().sum(-1).mean()
            assert changes["error"][key] == pytest.approx(float(expected), rel=1e-4)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_probe_is_a_sampling_loop_of_flow_matching():
    model = tiny_sd3()
    adapter = adapter_for(model)
    data = CalibrationSet(tiny_sd3_batches(), adapter, model)
    probe = Probe(model, adapter, flow_scheduler(), data, steps=6, samples=3, seed=0)
    scheduler, x = flow_scheduler(), probe.start().latents
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps:
        with torch.no_grad():
            velocity = adapter.predict(model, x, t.expand(3), probe._inputs)
        x = scheduler.step(velocity, t, x).prev_sample
    assert torch.equal(probe.run([model, model], [2, 4]).latents, x)
