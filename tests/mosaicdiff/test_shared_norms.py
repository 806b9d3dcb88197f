"""Norms over all heads: exact, or of the kept heads alone with an error that is told."""

import json
import math
from dataclasses import replace

import pytest
import torch

from mosaicdiff import PruneConfig, StagedDenoiser, calibrate, pipeline, prune
from mosaicdiff.adapters import adapter_for
from mosaicdiff.allocation.latency import measure_table
from mosaicdiff.pipeline import cut
from mosaicdiff.report import report_from_dict
from mosaicdiff.shared_norms import norm_error

from . import cases_b
from .conftest import flow_scheduler, linear_scheduler, tiny_batches, tiny_denoiser
from .cutting import pack, zeroed
from .test_families import call, uneven
from .test_families_end_to_end import SMALL

pytestmark = pytest.mark.models

FAMILIES = {
    "wan": (cases_b.tiny_wan, cases_b.wan_batch),
    "wan-picture": (cases_b.tiny_wan_picture, cases_b.wan_picture_batch),
    "ltx": (cases_b.tiny_ltx, cases_b.ltx_batch),
    "sana1.5": (lambda: cases_b.tiny_sana(qk_norm="rms_norm_across_heads"), cases_b.sana_batch),
}


class Case:
    def __init__(self, batch):
        self.batch = batch


@pytest.fixture(params=FAMILIES)
def family(request):
    make, batch = FAMILIES[request.param]
    return make().double(), Case(batch)


def test_the_approximation_is_the_norm_of_the_kept_heads_alone(family):
    dense, case = family
    kept = uneven(dense)
    # By hand, in the dense model: channels of removed heads zeroed before the norm, which then
    # divides by too little, by the root of the share that is kept.
    by_hand = zeroed(dense, kept)
    for layer in adapter_for(dense).layers(dense):
        gone = torch.ones(layer.columns_of_groups, dtype=torch.bool)
        gone[layer.columns(torch.tensor(kept[layer.name]))] = False
        root = math.sqrt(1 - float(gone.double().mean()))
        for writer in layer.writers:
            norm = by_hand.get_submodule(writer.module)
            if writer.whole and norm.weight.ndim == 1:
                norm.register_forward_pre_hook(
                    lambda norm, args, gone=gone, root=root: args[0].masked_fill(gone, 0.0) / root
                )
                norm.register_forward_hook(lambda norm, args, out, root=root: out * root)
    given = call(pack(dense, kept, "approximate"), case)
    assert (given - call(by_hand, case)).abs().max() <= 1e-9
    assert (given - call(pack(dense, kept), case)).abs().max() > 1e-4


def test_approximate_costs_are_what_cutting_saves(family):
    dense, _ = family
    adapter, kept = adapter_for(dense), uneven(dense)
    layers = adapter.layers(dense, "approximate")
    counts = [adapter.macs(m) for m in (dense, pack(dense, kept, "approximate"), pack(dense, kept))]
    gone = {row.name: row.groups - len(kept[row.name]) for row in layers}
    assert counts[0].linear - counts[1].linear == sum(r.cost * gone[r.name] for r in layers)
    assert counts[0].attention - counts[1].attention == sum(
        r.products * gone[r.name] for r in layers
    )
    assert counts[1].linear < counts[2].linear


def test_approximate_is_fused_afterwards(family):
    dense, case = family
    packed = pack(dense, uneven(dense), "approximate")
    expected = call(packed, case)
    packed.fuse_qkv_projections()
    assert (call(packed, case) - expected).abs().max() <= 1e-9


def pruned(family, **options):
    dense, case = family
    latents, _, inputs = case.batch(8)
    config = PruneConfig(**SMALL | {"sparsity": 0.4, "allocation": "uniform"} | options)
    return prune(dense.float(), config, scheduler=flow_scheduler(), calibration=[(latents, inputs)])


def test_the_error_is_measured_and_told(family, tmp_path):
    result = pruned(family, shared_norms="approximate")
    errors = [stage.norm_error for stage in result.report.stages]
    assert all(0 < error < 1 for error in errors)
    assert "norm error" in [column.header for column in result.report.stage_table().columns]
    result.denoiser.save_pretrained(tmp_path / "m")
    stored = json.loads((tmp_path / "m" / "report.json").read_text())
    assert [stage["norm_error"] for stage in stored["stages"]] == errors
    loaded = StagedDenoiser.from_pretrained(tmp_path / "m")
    for mine, theirs in zip(result.denoiser.stage_models, loaded.stage_models, strict=True):
        ours = call(mine, family[1], torch.float32)
        assert torch.equal(ours, call(theirs, family[1], torch.float32))


def test_the_error_by_hand():
    """The mean squared difference to the exact norms of the same kept heads and readers."""
    family = cases_b.tiny_wan(), Case(cases_b.wan_batch)
    dense, case = family
    result = pruned(family, shared_norms="approximate", compensation="none", criterion="magnitude")
    staged = result.denoiser
    latents, timesteps, inputs = case.batch()
    given = norm_error(dense, staged, 0, [(latents, timesteps, inputs)])
    kept = {name: groups.tolist() for name, groups in staged.info.kept[0].items()}
    exact = call(pack(dense, kept), case, torch.float32)  # no reader was refitted
    difference = call(staged.stage_models[0], case, torch.float32) - exact
    expected = float(difference.double().square().sum() / exact.double().square().sum())
    assert given == pytest.approx(expected, rel=1e-6)
    assert given > 0


def test_an_error_that_is_no_number_is_refused():
    family = cases_b.tiny_wan(), Case(cases_b.wan_batch)
    staged = pruned(family, shared_norms="approximate").denoiser
    latents, timesteps, inputs = family[1].batch()
    with pytest.raises(RuntimeError, match="must be finite and not all zero"):
        norm_error(family[0], staged, 0, [(latents * float("nan"), timesteps, inputs)])


def test_the_statistic_is_made_good_on_average(monkeypatch):
    """Heads of different loudness: the norm of the kept alone is off by a factor."""
    dense, case = cases_b.tiny_wan(num_attention_heads=4), Case(cases_b.wan_batch)
    for block in dense.blocks:
        for attention in (block.attn1, block.attn2):
            for linear in (attention.to_q, attention.to_k):
                loud = torch.tensor([0.3, 3.0, 0.5, 1.0]).repeat_interleave(12)
                linear.weight.data.mul_(loud[:, None])
                linear.bias.data.mul_(loud)
    folded = pruned((dense, case), shared_norms="approximate")
    monkeypatch.setattr(pipeline, "fold_statistics", lambda job, staged: None)
    plain = pruned((dense, case), shared_norms="approximate")
    for mine, theirs in zip(folded.report.stages, plain.report.stages, strict=True):
        assert mine.norm_error < 0.7 * theirs.norm_error
    for stage, other in zip(folded.denoiser.stage_models, plain.denoiser.stage_models, strict=True):
        ratio = stage.blocks[0].attn1.norm_q.weight / other.blocks[0].attn1.norm_q.weight
        assert ratio.std() < 1e-5 and abs(float(ratio.mean()) - 1) > 0.01


def test_exact_says_nothing_of_it():
    family = cases_b.tiny_wan(), Case(cases_b.wan_batch)
    report = pruned(family).report
    assert all(stage.norm_error is None for stage in report.stages)
    assert "norm error" not in [column.header for column in report.stage_table().columns]
    assert report_from_dict(report.to_dict()) == report


def test_cut_follows():
    dense = cases_b.tiny_wan()
    config = PruneConfig(sparsity=0.4, allocation="uniform", stages=1)
    exact, given = (
        cut(dense, replace(config, shared_norms=kind), scheduler=flow_scheduler())
        for kind in ("exact", "approximate")
    )
    names = ["blocks.0.attn1.to_q.weight", "blocks.0.attn1.norm_q.weight"]
    shapes = [given.stage_models[0].get_parameter(name).shape[0] for name in names]
    assert shapes[0] == shapes[1] < 36
    assert exact.stage_models[0].get_parameter(names[0]).shape[0] == 36


def test_refused_where_there_are_none():
    with pytest.raises(ValueError, match="shared_norms must be exact, got 'approximate': this DiT"):
        prune(
            tiny_denoiser(), PruneConfig(shared_norms="approximate"),
            scheduler=linear_scheduler(), calibration=tiny_batches(),
        )  # fmt: skip
    with pytest.raises(ValueError, match="shared_norms must be one of exact, approximate"):
        PruneConfig(shared_norms="near")
    with pytest.raises(ValueError, match="shared_norms must be left out with granularity"):
        PruneConfig(shared_norms="approximate", granularity="unstructured")


def test_without_latents_the_error_cannot_be_measured():
    dense, (latents, _, inputs) = cases_b.tiny_wan(), cases_b.wan_batch(8)
    config = PruneConfig(**SMALL | {"stages": 1, "allocation": "uniform"})
    measured = calibrate(dense, config, scheduler=flow_scheduler(), calibration=[(latents, inputs)])
    config = replace(config, shared_norms="approximate")
    with pytest.raises(ValueError, match="calibration must be given with shared_norms='approx"):
        prune(dense, config, scheduler=flow_scheduler(), measured=measured)
    # Statistics are of what the readers see, which does not depend on the norms' form.
    report = prune(
        dense, config, scheduler=flow_scheduler(), measured=measured,
        calibration=[(latents, inputs)],
    ).report  # fmt: skip
    assert 0 < report.stages[0].norm_error < 1


def test_timings_are_of_one_form(tmp_path):
    dense = cases_b.tiny_sana(qk_norm="rms_norm_across_heads")
    adapter, options = adapter_for(dense), {"points": 2, "repeats": 1}
    exact = measure_table(dense, adapter, **options)
    given = measure_table(dense, adapter, shared_norms="approximate", **options)
    exact.check(dense, 1)
    given.check(dense, 1, "approximate")
    for table, form in ((exact, "approximate"), (given, "exact")):
        with pytest.raises(ValueError, match="Measure"):
            table.check(dense, 1, form)
