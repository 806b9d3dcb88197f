"""Dense beside pruned on tiny pipelines: same noise, guidance, costs, what is refused."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import mosaicdiff
from mosaicdiff.adapters import adapter_for
from mosaicdiff.evaluate import Judges, Metric, Row, compare, sample_images
from mosaicdiff.evaluate.evaluation import mark_best
from mosaicdiff.evaluate.frechet import moments
from mosaicdiff.evaluate.networks import Features
from mosaicdiff.evaluate.reference import Reference
from mosaicdiff.evaluate.sampling import balanced_labels

from ..conftest import tiny_batches, tiny_denoiser, tiny_pipeline

QUICK = {"num_images": 6, "steps": 4, "batch_size": 4}


class Pixels:
    """Features that are pixels, and four classes that are quarters of the picture."""

    name = "pixels"
    classes = 4

    def __call__(self, images):
        quarters = torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2)
        return Features(images.flatten(1)[:, ::3], (8 * quarters).flatten(1).softmax(1))


class Bright:
    """The mean brightness, as a score of prompts."""

    metric = Metric("bright", "brightness", "higher", "condition", "none")

    def __call__(self, images, prompts):
        assert len(images) == len(prompts)
        return float(images.double().mean())


def pixel_judges(real, **options):
    def reference(shape):
        assert shape == tuple(real.shape[1:])
        features = Pixels()(real).values
        return Reference("noise", moments(features.numpy()), features)

    return Judges(Pixels(), reference, **options)


@pytest.fixture(scope="module")
def pair():
    """A tiny pipeline and its pruned self."""
    dense, pruned = (tiny_pipeline(tiny_denoiser()) for _ in range(2))
    config = mosaicdiff.PruneConfig(sparsity=0.4, samples=48, steps=20)
    mosaicdiff.prune(pruned, config, calibration=tiny_batches())
    return dense, pruned


@pytest.fixture(scope="module")
def real():
    return torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def swept(pair, real):
    return compare(*pair, judges=pixel_judges(real), guidance_scales=(2.0, 1.0), **QUICK)


def test_every_model_has_a_row_at_every_guidance(swept):
    assert [(row.model, row.guidance_scale) for row in swept.rows] == [
        ("dense", 2.0), ("pruned", 2.0), ("dense", 1.0), ("pruned", 1.0),
    ]  # fmt: skip
    names = [metric.name for metric in swept.metrics]
    assert names == [
        "frechet", "precision", "recall", "inception_score", "mse_to_dense", "psnr", "ssim",
    ]  # fmt: skip
    for row in swept.rows:
        own = set(names) if row.model == "pruned" else set(names[:4])
        assert set(row.metrics) == own
    assert all(row.seconds_per_image > 0 for row in swept.rows)


def test_pictures_are_those_of_the_same_seed(swept, pair):
    labels = balanced_labels(6, 1000)
    for row in swept.rows:
        pipe = pair[row.model == "pruned"]
        expected, _ = sample_images(pipe, labels, steps=4, guidance_scale=row.guidance_scale)
        found = swept.images[row.model, row.guidance_scale]
        assert (found - expected).abs().max() < 1e-3
    a, b = (swept.images["dense", scale] for scale in (1.0, 2.0))
    assert (a - b).abs().max() > 1e-3


def test_differences_are_of_the_pictures(swept):
    for scale in (1.0, 2.0):
        a, b = (swept.images[model, scale].double() for model in ("dense", "pruned"))
        row = swept.row("pruned", scale)
        assert row.metrics["mse_to_dense"] == pytest.approx(float((a - b).square().mean()))
        errors = ((a - b) / 2).square().flatten(1).mean(1)
        assert row.metrics["psnr"] == pytest.approx(float((-10 * errors.log10()).mean()), rel=1e-5)


def test_costs_are_counted_at_the_calls_that_were_made(swept, pair):
    dense, pruned = (pipe.transformer for pipe in pair)
    macs = adapter_for(dense).macs(dense)
    for scale, passes in ((1.0, 4), (2.0, 8)):
        row = swept.row("dense", scale)
        assert row.passes_per_image == passes
        assert row.macs_per_image == passes * macs.linear
        assert row.macs_with_attention_per_image == passes * macs.total
        small = swept.row("pruned", scale)
        assert small.macs_with_attention_per_image == pytest.approx(passes * pruned.mean_macs()[1])
        assert small.parameters > small.bytes // 8
    assert swept.row("dense", 1.0).bytes == 4 * sum(p.numel() for p in dense.parameters())
    assert not dense._forward_pre_hooks and not pruned._forward_pre_hooks


def test_each_model_has_its_own_best_guidance(swept):
    assert swept.best_by == "frechet"
    for model in ("dense", "pruned"):
        rows = [row for row in swept.rows if row.model == model]
        best = min(rows, key=lambda row: row.metrics["frechet"])
        assert swept.best(model) is best
        assert [row for row in rows if "frechet" in row.best_by] == [best]
    ratio = swept.ratio(*swept.pairs[0])
    assert ratio.dense_guidance == ratio.pruned_guidance == 2.0
    assert ratio.macs > 1


def test_a_best_at_the_end_of_the_sweep_is_told(swept):
    for model in ("dense", "pruned"):
        told = f"The {model} model is best at guidance 2, the largest that was tried"
        at_the_end = swept.best(model).guidance_scale == 2.0
        assert any(note.startswith(told) for note in swept.notes) == at_the_end
    rows = mark_best(rows_of(2.0, 1.0), (Metric("x", "x", "lower", "itself"),))
    module = sys.modules["mosaicdiff.evaluate.compare"]
    assert len(module._edge_notes(rows, (0.0, 1.0), "x")) == 1
    assert module._edge_notes(rows, (0.0, 1.0), None) == ()
    assert module._edge_notes(rows[:1], (0.0, 1.0), "x") == ()


def test_it_is_plain_values(swept):
    values = json.loads(json.dumps(swept.to_dict()))
    assert len(values["rows"]) == 4 and "images" not in values
    assert values["best"] == {row.model: row.guidance_scale for row in swept.best_pair}
    assert values["ratio_at_best"]["speedup"] > 0 and len(values["ratios"]) == 2
    setting = values["setting"]
    assert setting["versions"].keys() == {"mosaicdiff", "diffusers", "torch", "python"}
    assert setting["reference"] == "noise" and setting["reference_images"] == 20
    assert setting["conditions"] == list(range(6)) and setting["seed"] == 0
    assert any("biased upwards" in note for note in values["notes"])
    assert any("Seconds are of 2 batches" in note for note in values["notes"])


def test_batches_do_not_matter(swept, pair, real):
    found = compare(
        *pair, judges=pixel_judges(real), guidance_scales=(2.0,), **{**QUICK, "batch_size": 6}
    )
    for one, other in zip(found.rows, swept.rows, strict=False):
        for name, value in one.metrics.items():
            assert other.metrics[name] == pytest.approx(value, rel=1e-3)
        assert one.passes_per_image == other.passes_per_image


def test_the_metric_that_chooses_is_chosen(pair, real):
    found = compare(
        *pair, judges=pixel_judges(real), guidance_scales=(2.0, 1.0), best_by="recall", **QUICK
    )
    for model in ("dense", "pruned"):
        rows = [row for row in found.rows if row.model == model]
        assert found.best(model).metrics["recall"] == max(row.metrics["recall"] for row in rows)


def test_without_a_network_only_differences_are_measured(pair):
    found = compare(*pair, guidance_scales=(1.0, 2.0), **QUICK)
    assert [metric.name for metric in found.metrics] == ["mse_to_dense", "psnr", "ssim"]
    assert found.best_by is None and found.best_pair is None
    assert found.to_dict()["best"] is None
    with pytest.raises(ValueError, match="best_by must name a metric to choose among 2 guidance"):
        found.best("dense")
    with pytest.raises(ValueError, match="got 'dense' at 3.0. Sampled were 1.0, 2.0"):
        found.row("dense", 3.0)
    with pytest.raises(ValueError, match="name must be one of mse_to_dense, psnr, ssim"):
        found.metric("frechet")


def test_no_pictures_but_the_first_are_kept(pair, monkeypatch):
    module = sys.modules["mosaicdiff.evaluate.compare"]  # the package's attribute is the function
    monkeypatch.setattr(module, "_KEPT", 3)
    found = compare(*pair, **{**QUICK, "num_images": 5, "batch_size": 2})
    assert {len(images) for images in found.images.values()} == {3}
    monkeypatch.setattr(module, "_KEPT_BYTES", 1)
    found = compare(*pair, **{**QUICK, "num_images": 5, "batch_size": 2})
    assert {len(images) for images in found.images.values()} == {1}


def rows_of(*values, model="dense", name="x"):
    row = Row(model, None, 1, 1, 1.0, 1.0, 1.0, 1.0, {})
    return tuple(replace(row, guidance_scale=float(i), metrics={name: v})
                 for i, v in enumerate(values))  # fmt: skip


@pytest.mark.parametrize(
    "better, values, best",
    [
        ("lower", (3.0, 1.0, 2.0), 1),
        ("higher", (3.0, 1.0, 2.0), 0),
        ("lower", (1.0, 1.0), 0),
        ("lower", (float("nan"), 5.0), 1),
    ],
)
def test_the_best_of_a_sweep_is_marked(better, values, best):
    rows = mark_best(rows_of(*values), (Metric("x", "x", better, "itself"),))
    assert [row.best_by for row in rows] == [("x",) if i == best else () for i in range(len(rows))]


def test_bad_requests_are_refused_before_anything_is_drawn(pair, real):
    drawn = []
    cases = [
        ({"guidance_scales": ()}, "guidance_scales must be at least one, each once"),
        ({"guidance_scales": (1.0, 1.0)}, "guidance_scales must be at least one, each once"),
        ({"prompts": ["a"]}, "prompts must be left out for DiTPipeline, which takes no text"),
        ({"num_images": 3}, "num_images must be at least 4, got 3: precision and recall look at 3"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            compare(*pair, judges=pixel_judges(real), **{**QUICK, **change}, advance=drawn.append)
    with pytest.raises(ValueError, match="brightness must be left out for DiTPipeline"):
        compare(*pair, judges=Judges(prompt_scores=(Bright(),)), **QUICK)
    assert not drawn


def test_what_cannot_choose_is_refused_before_the_long_run(pair, real):
    drawn = []
    for name in ("psnr", "beauty"):
        message = "best_by must be frechet, precision, recall, inception_score, got"
        with pytest.raises(ValueError, match=message):
            compare(*pair, judges=pixel_judges(real), best_by=name, advance=drawn.append, **QUICK)
    with pytest.raises(ValueError, match="best_by must be left out without a feature network"):
        compare(*pair, best_by="frechet", advance=drawn.append, **QUICK)
    with pytest.raises(ValueError, match="reference must have more than 3 pictures, got 3"):
        compare(*pair, judges=pixel_judges(real[:3]), advance=drawn.append, **QUICK)
    assert not drawn


def test_a_reference_of_another_network_is_refused(pair):
    held = Reference("x.npz", moments(torch.rand(9, 5).numpy()), None)
    with pytest.raises(ValueError, match="must be of the 22 features of pixels, got 5 in x.npz"):
        compare(*pair, judges=Judges(Pixels(), lambda shape: held), **QUICK)


def test_judges_must_be_whole():
    with pytest.raises(ValueError, match="network and reference must be given together"):
        Judges(network=Pixels())
    with pytest.raises(ValueError, match="neighbours and splits must be at least 1, got 0 and 1"):
        Judges(neighbours=0)


def test_pipelines_of_two_kinds_are_refused(pair):
    from ..conftest import tiny_sd3, tiny_sd3_pipeline

    other = tiny_sd3_pipeline(tiny_sd3())
    with pytest.raises(ValueError, match="one kind, got DiTPipeline and StableDiffusion3Pipeline"):
        compare(pair[0], other, **QUICK)
    with pytest.raises(ValueError, match="prompts must be given for StableDiffusion3Pipeline"):
        compare(other, other, **QUICK)
