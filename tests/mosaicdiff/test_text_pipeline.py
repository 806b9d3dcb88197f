"""SD3 asked in words: what it is calibrated on, against recordings in float64."""

import pytest
import torch
from diffusers import DiffusionPipeline

import mosaicdiff
from mosaicdiff import PruneConfig
from mosaicdiff.evaluate import sample_images
from mosaicdiff.evaluate.pictures import decode_latents
from mosaicdiff.groups import input_widths
from mosaicdiff.request import prepare
from mosaicdiff.sources import class_count
from mosaicdiff.statistics.collect import collect
from mosaicdiff.trajectory.weights import step_weights

PROMPTS = ["a cat", "a dog", "", "b cat 7", "dogs"]
#: Few text tokens of T5: 12 of CLIP and 8.
SHORT = {"max_sequence_length": 8}


@pytest.fixture
def pipe(tiny_sd3_folder):
    return mosaicdiff.load_pipeline(tiny_sd3_folder)


def asked(steps=4, stages=1, samples=5, batch=2, **fields) -> PruneConfig:
    trajectory = {"samples": samples, "batch_size": batch, "options": SHORT} | fields.pop(
        "trajectory", {}
    )
    fields = {"sparsity": 0.3, "allocation": "uniform"} | fields
    return PruneConfig(
        activations="trajectory", steps=steps, stages=stages, trajectory=trajectory, **fields
    )


def test_the_whole_pipeline_is_plain_diffusers_and_reads_its_prompts(tiny_sd3_folder):
    pipe = DiffusionPipeline.from_pretrained(tiny_sd3_folder)
    pipe.set_progress_bar_config(disable=True)
    pictures = [
        pipe(prompt, num_inference_steps=2, generator=torch.manual_seed(0), output_type="np",
             **SHORT).images
        for prompt in ("a cat", "a dog", "a cat")
    ]  # fmt: skip
    assert (pictures[0] == pictures[2]).all() and (pictures[0] != pictures[1]).any()


def test_a_pipeline_saved_without_its_t5_is_loaded_without(tiny_sd3_folder, tmp_path):
    without = {"text_encoder_3": None, "tokenizer_3": None}
    DiffusionPipeline.from_pretrained(tiny_sd3_folder, **without).save_pretrained(tmp_path / "a")
    pipe = mosaicdiff.load_pipeline(tmp_path / "a")
    assert pipe.text_encoder_3 is None and pipe.text_encoder_2 is not None
    mosaicdiff.prune(pipe, asked(granularity="2:4", sparsity=None), prompts=PROMPTS)
    pipe.save_pretrained(tmp_path / "b")
    assert mosaicdiff.load_pipeline(tmp_path / "b").transformer.masks[0]


def by_hand(job, guidance):
    """Sums over recorded inputs of every reader, by stage: h, mean and weight of the tokens."""
    pipe, config, seen = job.pipeline, job.config, {}
    size, count = config.trajectory.batch_size, config.trajectory.samples
    weights = step_weights(config.trajectory.weights, config.steps, config.trajectory.weight_range)
    division, found = job.frame.division, [{} for _ in job.frame.division.stages]
    timesteps = []
    handles = [
        job.denoiser.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0])
        )
        for name in input_widths(job.layers)
    ]
    handles.append(
        job.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: timesteps.append(float(kwargs["timestep"].max())),
            with_kwargs=True,
        )
    )
    for number, first in enumerate(range(0, count, size)):
        seen.clear(), timesteps.clear()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        prompts = PROMPTS[first : min(first + size, count)]
        pipe(prompts, num_inference_steps=config.steps, guidance_scale=guidance,
             generator=generator, output_type="latent", **SHORT)  # fmt: skip
        assert len(timesteps) == config.steps
        for name, calls in seen.items():
            for step, (x, timestep) in enumerate(zip(calls, timesteps, strict=True)):
                assert x.dtype == torch.float64
                assert len(x) == len(prompts) * (2 if guidance > 1 else 1)
                rows, weight = x.flatten(0, -2), weights[step]
                sums = found[stage_at(division, timestep)].setdefault(name, [0.0, 0.0, 0.0])
                sums[0] += weight * rows.T @ rows
                sums[1] += weight * rows.sum(0)
                sums[2] += weight * len(rows)
    for handle in handles:
        handle.remove()
    return found


def stage_at(division, timestep):
    """What the denoiser is given is 1000 sigma, of which SNR = (1 - sigma)^2 / sigma^2."""
    sigma = torch.tensor(timestep / 1000, dtype=torch.float64)
    log_snr = float(2 * ((1 - sigma).clamp_min(1e-9).log() - sigma.log()))
    return sum(log_snr >= boundary for boundary in division.boundaries)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("weights", ["log_decrease", "linear_increase"])
def test_hessians_of_both_streams_are_those_summed_by_hand(pipe, guidance, stages, weights):
    pipe.to(torch.float64)
    config = asked(
        steps=6, stages=stages, trajectory={"guidance_scale": guidance, "weights": weights}
    )
    job = prepare(pipe, config, None, None, prompts=PROMPTS)
    readers = input_widths(job.layers)
    kinds = {name.split(".", 2)[2] for name in readers}
    assert {"attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2"} <= kinds
    got = collect(job, job.denoiser, readers, lambda *told: None)
    wanted = by_hand(job, guidance)
    assert len(got) == len(wanted) == stages
    for mine, row in zip(got, wanted, strict=True):
        assert set(mine) == set(row) == set(readers)
        for name, (h, total, weight) in row.items():
            found, h = mine[name].unpack(torch.device("cpu")), h / weight
            assert found.hessian.dtype == torch.float64
            assert found.weight == pytest.approx(weight, rel=1e-12)
            assert (found.hessian - h).abs().max() <= 1e-12 * h.abs().max(), name
            assert (found.mean - total / weight).abs().max() <= 1e-12 * h.diagonal().max().sqrt()
    tokens = {"to_out.0": 16, "to_add_out": 20, "ff.net.2": 16, "ff_context.net.2": 20}
    rows = len(PROMPTS) * (2 if guidance > 1 else 1)
    steps = sum(step_weights(weights, 6))
    for name in readers:
        count = next(n for kind, n in tokens.items() if name.endswith(kind))
        assert sum(row[name].weight for row in got) == pytest.approx(count * rows * steps)


@pytest.mark.parametrize(
    "fields, share",
    [
        ({"stages": 3}, 0.3),
        ({"stages": 3, "packages": 2}, 0.3),
        ({"sparsity": 0.6, "granularity": "unstructured"}, 0.6),
        ({"sparsity": None, "granularity": "2:4", "packages": 2}, 0.5),
    ],
    ids=["structured", "in packages", "unstructured", "2:4"],
)
def test_a_pipeline_is_pruned_in_place_and_sampled(pipe, fields, share):
    def pictures():
        return pipe("a cat", num_inference_steps=4, generator=torch.manual_seed(1),
                    output_type="np", **SHORT).images  # fmt: skip

    dense = pictures()
    result = mosaicdiff.prune(pipe, asked(**fields), prompts=PROMPTS)
    assert pipe.transformer is result.denoiser
    assert result.report.sparsity == pytest.approx(share, abs=0.02)
    assert 0 < abs(pictures() - dense).max() < 1


@pytest.mark.parametrize("allocation", ["uniform", "optimal"])
@pytest.mark.parametrize("height, width", [(4, 8), (12, 12)])
def test_pictures_of_another_size_calibrate_as_well(pipe, allocation, height, width):
    """What is measured of the drawn latents must not ask for the denoiser's own size."""
    options = SHORT | {"height": height, "width": width}
    config = asked(
        steps=4, stages=2, allocation=allocation, trajectory={"options": options}, probe_samples=4
    )
    result = mosaicdiff.prune(pipe, config, prompts=PROMPTS)
    assert result.report.sparsity == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    "option, kind", [({"clip_skip": 9}, IndexError), ({"height": 7}, ValueError)]
)
def test_what_the_pipeline_raises_says_in_which_batch(pipe, option, kind):
    config = asked(trajectory={"options": SHORT | option})
    with pytest.raises(kind, match=f"collect: batch 1 of 3 failed: {kind.__name__}") as caught:
        mosaicdiff.prune(pipe, config, prompts=PROMPTS)
    assert caught.value.batch == 1


def test_latents_are_decoded_as_the_pipeline_decodes(pipe):
    """The autoencoder of SD3 shifts its latents."""
    assert pipe.vae.config.shift_factor
    drawn = [
        pipe("a cat", num_inference_steps=2, generator=torch.manual_seed(0), output_type=kind,
             **SHORT).images
        for kind in ("latent", "pt")
    ]  # fmt: skip
    torch.testing.assert_close(decode_latents(pipe.vae, drawn[0]), drawn[1])


def test_pictures_of_prompts_do_not_depend_on_their_batch(pipe):
    sizes = (1, 3)
    pictures = [
        sample_images(pipe, PROMPTS[:3], steps=2, guidance_scale=None, batch_size=size,
                      options=SHORT)[0]
        for size in sizes
    ]  # fmt: skip
    assert pictures[0].shape == (3, 1, 8, 8)
    torch.testing.assert_close(*pictures, rtol=1e-3, atol=1e-4)


def test_what_takes_no_condition_is_not_sampled(pipe):
    class Unconditional:
        def __call__(self, batch_size=1):
            raise AssertionError

    with pytest.raises(ValueError, match="class-conditional or asked in words, got Unconditional"):
        sample_images(Unconditional(), ["a cat"])
    with pytest.raises(ValueError, match="class_count: pipeline must be class-conditional, got"):
        class_count(pipe)
