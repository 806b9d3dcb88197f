"""The kept student of four steps draws digits, and better ones than its teacher in four."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from benchmarks.student import FIXTURE, load_student, record_of
from mosaicdiff import digits
from mosaicdiff.evaluate import DigitsJudge, sample_images
from mosaicdiff.evaluate.sampling import balanced_labels
from mosaicdiff.sources import load_pipeline

IMAGES = 200


@pytest.fixture(scope="module")
def student() -> DiffusionPipeline:
    return load_student()


def draw(pipe: DiffusionPipeline, images: int, steps: int) -> torch.Tensor:
    labels = balanced_labels(images, digits.CLASSES)
    return sample_images(pipe, labels, steps=steps, batch_size=100)[0]


def test_the_fixture_is_small():
    assert FIXTURE.stat().st_size < 6e6


def test_four_steps_start_at_pure_noise(student):
    student.scheduler.set_timesteps(4)
    assert student.scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_better_than_the_teacher_in_four_steps(student):
    judge, teacher = DigitsJudge(), load_pipeline("digits")
    spaced = load_pipeline("digits")
    spaced.scheduler = DDIMScheduler.from_config(student.scheduler.config)
    labels = torch.tensor(balanced_labels(IMAGES, digits.CLASSES))
    pictures = [draw(pipe, IMAGES, 4) for pipe in (student, teacher, spaced)]
    reached, *others = (judge.score(images, labels) for images in pictures)
    assert reached["accuracy"] > 0.93
    assert reached["frechet"] < 0.85 * min(other["frechet"] for other in others)
    # What it was taught: where many steps end.
    few = 30
    goal = draw(spaced, few, 48)
    error, *errors = ((images[:few] - goal).square().mean() for images in pictures)
    assert error < 0.25 * min(errors)


def test_the_record_is_of_a_better_student():
    distance = record_of()["frechet"]
    assert distance["student_4_steps"] < 0.7 * distance["teacher_4_steps"]
    assert distance["student_4_steps"] < 0.7 * distance["teacher_4_steps_trailing"]
