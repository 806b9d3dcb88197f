"""Benches: rows of every mode, memory, where the time goes."""

import pytest
import torch

from mosaicdiff import PruneConfig
from mosaicdiff.evaluate import latency, room
from mosaicdiff.evaluate.bench import bench_modes
from mosaicdiff.evaluate.configurations import random_denoiser, random_staged, usual_scheduler
from mosaicdiff.evaluate.latency import check_modes, measure_modes, mode_networks
from mosaicdiff.evaluate.peak import peak_bytes
from mosaicdiff.evaluate.spent import TimeSpent, kind_of, mean_spent, time_spent
from mosaicdiff.pipeline import cut
from tests.mosaicdiff.conftest import linear_scheduler, tiny_denoiser

CPU = torch.device("cpu")


@pytest.fixture
def pair():
    dense = tiny_denoiser()
    config = PruneConfig(sparsity=0.4, allocation="score", steps=20)
    return dense, cut(dense, config, scheduler=linear_scheduler())


def test_a_report_of_every_mode_size_and_count(pair):
    dense, staged = pair
    told = []
    report = bench_modes(
        "tiny", dense, staged, linear_scheduler(), modes=["eager", "fused"], batch_sizes=[1, 3],
        steps=[20, 10], repeats=2, tell=lambda *args: told.append(args),
    )  # fmt: skip
    asked = {(r.mode, r.network, r.batch_size, r.steps) for r in report.rows}
    assert len(asked) == len(report.rows) == 2 * 2 * 2 * 2
    for row in report.rows:
        image = row.milliseconds * row.steps / row.batch_size
        assert row.milliseconds_per_image == pytest.approx(image)
        assert row.efficiency == pytest.approx(row.speedup / row.macs_ratio)
        assert row.peak_bytes > sum(p.nbytes for p in dense.parameters()) * 0.9
        if row.network == "dense":
            assert row.macs_ratio == row.speedup == 1.0
            assert row.over_eager == 1.0 or row.mode == "fused"
        else:
            assert row.macs_ratio > 1.4
    # Steps fall into the stages otherwise, so the mean of MACs is another.
    macs = {r.steps: r.macs for r in report.rows if r.network == "pruned"}
    assert macs[20] != macs[10]
    assert told[-1] == ("profile", 2, 2)
    assert [(t["mode"], t["network"]) for t in report.time] == [
        (mode, network) for mode in ("eager", "fused") for network in ("dense", "pruned")
    ]
    stated, measured = report.memory["stated"], report.memory["measured"]
    assert measured["resident"]["live"]["cpu"] == stated["resident"]
    assert measured["swap"]["live"]["cpu"] == stated["swap_device"]
    assert staged.stage_memory == "resident"


def test_modes_are_around_the_same_weights(pair):
    dense, staged = pair
    eager, fused = mode_networks(dense, staged, ["eager", "fused"])
    latents, labels = torch.randn(2, 2, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        for (plain, timestep), (quick, _) in zip(eager, fused, strict=True):
            step = torch.full((2,), timestep)
            wanted = plain(latents, step, labels).sample
            assert torch.allclose(quick(latents, step, labels).sample, wanted, atol=1e-5)
            assert plain is not quick
        for one, other in zip(dense.parameters(), fused[0][0].parameters(), strict=True):
            assert one is other
    assert "forward" not in dense.__dict__


def test_modes_that_keep_their_memory_to_themselves(pair, monkeypatch):
    monkeypatch.setitem(latency.MODES, "compiled", {"compile": {"backend": "eager"}})
    report = bench_modes("tiny", *pair, linear_scheduler(), modes=["compiled"], steps=[20],
                         repeats=1)  # fmt: skip
    assert [row.peak_bytes for row in report.rows] == [None, None]
    assert report.time == []


def test_over_eager_is_measured_without_the_mode_too(pair):
    ((report,),) = measure_modes(*pair, ["fused"], repeats=3)
    assert report.mode == "fused"
    assert all(ratio > 0 for ratio in report.over_eager)


def test_swapped_stages_are_refused(pair):
    dense, staged = pair
    staged.set_stage_memory("swap")
    with pytest.raises(ValueError, match="stages must be resident to be timed one by one"):
        bench_modes("tiny", dense, staged, linear_scheduler())


def test_modes_are_checked():
    with pytest.raises(ValueError, match="mode must be one of eager, fused.*, got 'quick'"):
        check_modes(["eager", "quick"], CPU)
    with pytest.raises(ValueError, match="mode must be one of"):
        check_modes([], CPU)
    with pytest.raises(RuntimeError, match="mode graphs needs a CUDA device, got cpu"):
        check_modes(["graphs"], CPU)


def test_peak_counts_what_lives_at_once():
    million = torch.zeros(1000, 250)  # 1 MB

    def call():
        a = million + 1
        b = a.view(-1)
        del a
        c = b * 2  # a's memory lives on in b
        del b
        return torch.cat([c, c])  # 1 + 2

    assert peak_bytes(call, CPU) == 3 * 10**6
    assert peak_bytes(lambda: million.add_(1), CPU) == 0


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", "products"), ("aten::mkldnn_convolution", "products"),
        ("sm90_xmma_gemm_bf16", "products"), ("ampere_bf16_s16816gemm", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::native_layer_norm", "norms"), ("aten::native_group_norm", "norms"),
        ("aten::gelu", "rest"), ("aten::addcmul", "rest"), ("aten::copy_", "rest"),
        ("aten::view", "free"), ("aten::t", "free"), ("aten::empty_strided", "free"),
        ("aten::tanh", "rest"),
    ],
)  # fmt: skip
def test_operators_are_sorted(operator, kind):
    assert kind_of(operator) == kind


def test_time_spent_adds_up():
    x = torch.randn(300, 300)
    spent = time_spent(lambda: torch.nn.functional.layer_norm(x @ x, (300,)), CPU)
    assert spent.products > 0 and spent.norms > 0 and spent.attention == 0
    assert spent.launches >= 0
    half = TimeSpent(1.0, 2.0, 3.0, 4.0, 5.0)
    mean = mean_spent([half, TimeSpent(3.0, 2.0, 1.0, 0.0, 5.0)], [0.25, 0.75])
    assert mean == TimeSpent(2.5, 2.0, 1.5, 1.0, 5.0)
    assert mean.total == 12.0


def test_embedders_of_random_dits_are_equal():
    dense = random_denoiser("dit-b-4", CPU, torch.float32)
    first, *others = (block.norm1.emb.state_dict() for block in dense.transformer_blocks)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    assert usual_scheduler(dense).config.beta_schedule == "linear"
    staged = random_staged(dense, PruneConfig(sparsity=0.33, round_to=64, allocation="score"))
    assert len(staged.stage_models) == 3


def test_what_does_not_fit_is_refused(monkeypatch):
    config = PruneConfig(sparsity=0.33, round_to=64, allocation="score")
    needed = room.networks_bytes("dit-b-4", config, torch.float32)
    dense = random_denoiser("dit-b-4", CPU, torch.float32)
    staged = random_staged(dense, config)
    held = {id(p): p.nbytes for p in (*dense.parameters(), *staged.parameters())}
    assert needed == sum(held.values())
    assert room.free_bytes(CPU) > 2**20
    monkeypatch.setattr(room, "free_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match="dit-b-4 must fit.*in float32 both take.*dtype bfloat16"):
        room.check_room("dit-b-4", config, CPU, torch.float32)
    room.check_room("dit-b-4", config, CPU, torch.bfloat16)
    monkeypatch.setattr(room, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="is free on cpu. Take a device with more"):
        room.check_room("dit-b-4", config, CPU, torch.float32)


def test_more_steps_than_timesteps_are_refused(pair):
    with pytest.raises(ValueError, match="steps must be at most 1000, .* got 2000"):
        bench_modes("tiny", *pair, linear_scheduler(), steps=[2000])
