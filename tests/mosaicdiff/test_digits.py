"""The embedded model is what its card says, and pruning it does what the README claims."""

import pytest
import torch

import mosaicdiff
from mosaicdiff import digits
from mosaicdiff.evaluate import DigitsJudge, compare, sample_images
from mosaicdiff.evaluate.sampling import balanced_labels
from mosaicdiff.inputs.load import load_calibration
from mosaicdiff.sources import load_pipeline


def test_the_weights_are_small_and_half_precision():
    folder = digits.MODEL_FOLDER.parent
    files = list(folder.rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) < 16e6
    from safetensors.torch import load_file

    assert {t.dtype for file in files for t in load_file(file).values()} == {torch.float16}


def test_the_classifier_reads_the_data():
    images, labels = digits.load_images()
    read = digits.load_classifier()(images).argmax(1)
    assert (read == labels).float().mean() > 0.97


def test_pictures_are_digits():
    labels = balanced_labels(60, 10)
    images, _ = sample_images(load_pipeline("digits"), labels, steps=20, batch_size=60)
    score = DigitsJudge().score(images, torch.tensor(labels))
    assert score["accuracy"] > 0.9
    noise = torch.rand(60, 1, 32, 32) * 2 - 1
    assert DigitsJudge().score(noise, torch.tensor(labels))["frechet"] > 5 * score["frechet"]


def test_pictures_do_not_depend_on_the_batch_size():
    pipe = load_pipeline("digits")
    (a, _), (b, _) = (
        sample_images(pipe, balanced_labels(6, 10), steps=4, batch_size=size) for size in (2, 6)
    )
    assert (a - b).abs().max() < 1e-3


def test_obs_by_score_loses_far_less_than_magnitude():
    """The claim in small: 40 pictures, 20 steps; the figures are in benchmarks/results."""
    dense = load_pipeline("digits")
    data = load_calibration(None, dense)
    errors = {}
    for criterion, compensation in (("obs", "plain"), ("magnitude", "none")):
        config = mosaicdiff.PruneConfig(
            sparsity=0.3, criterion=criterion, compensation=compensation, samples=256, steps=20
        )
        pipe = load_pipeline("digits")
        mosaicdiff.prune(pipe, config, calibration=data)
        result = compare(dense, pipe, num_images=40, steps=20, batch_size=40)
        errors[criterion] = result.rows[1].metrics["mse_to_dense"]
    assert 15 * errors["obs"] < errors["magnitude"]


def test_digits_of_another_copy_need_calibration(tmp_path):
    pipe = load_pipeline("digits")
    pipe.register_to_config(_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="a source must be given"):
        load_calibration(None, pipe)
