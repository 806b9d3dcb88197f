"""What a pipeline is sampled with, and what each mistake is told."""

import re

import pytest

from mosaicdiff.statistics.prompts import Prompts, call_options, condition_argument, read_prompts
from mosaicdiff.trajectory_config import TrajectoryConfig


def texts(source):
    return read_prompts(source, "prompt").values


def labels(source, classes=10, names=None, **options):
    return read_prompts(source, "class_labels", classes=classes, names=names, **options).values


def test_texts_are_taken_as_they_are():
    assert texts(["a cat", "", " two dogs "]) == ("a cat", "", " two dogs ")
    assert texts(("one",)) == ("one",)


def test_a_file_has_one_in_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\n  \n\u00fcber \u732b \nlast\u2028line".encode())
    assert texts(file) == texts(str(file)) == ("a cat", "\u00fcber \u732b", "last\u2028line")
    file.write_text("3\n\n tench \n0\n")
    assert labels(file, names={"tench": 7}) == (3, 7, 0)


def test_labels_are_numbers_or_names():
    assert labels([1, "2", "tench"], names={"tench": 9}) == (1, 2, 9)
    assert labels(range(3)) == (0, 1, 2)


def test_without_any_all_classes_are_drawn_evenly():
    drawn = labels(None, samples=64, seed=3)
    assert sorted(drawn) == list(range(10)) and list(drawn) != list(range(10))
    assert drawn == labels(None, samples=64, seed=3) != labels(None, samples=64, seed=4)
    assert labels(None, samples=4, seed=3) == drawn[:4]
    batches = list(Prompts("class_labels", drawn).batches(20, 8))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    assert sum(batches, []) == [*drawn, *drawn]


def test_fewer_prompts_than_samples_are_used_in_turn():
    batches = list(Prompts("prompt", ("a", "b", "c")).batches(7, 2))
    assert batches == [["a", "b"], ["c", "a"], ["b", "c"], ["a"]]


def test_the_digest_is_of_values_and_order():
    digests = {Prompts("prompt", v).digest for v in (("a", "b"), ("b", "a"), ("ab",), ("a",))}
    assert len(digests) == 4 and Prompts("prompt", ("a", "b")).digest in digests


@pytest.mark.parametrize(
    "source, message",
    [
        (None, "prompts must be given with activations='trajectory', got None"),
        ([], "prompts must hold at least one, got an empty list"),
        (["a", 3], r"prompts must be texts for this pipeline, got 3 (entry 1)"),
        ("a cat", "but a cat is no file: there is none. A single prompt is a list of one"),
    ],
)
def test_texts_that_are_none_are_refused(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        texts(source)


@pytest.mark.parametrize(
    "source, message",
    [
        ([], "prompts must hold at least one"),
        ([0, 10], "prompts must be labels in 0..9, got 10 (entry 1)"),
        ([-1], "labels in 0..9, got -1 (entry 0)"),
        ([1.0], "labels 0..9 for this class-conditional pipeline, got 1.0 (entry 0)"),
        ([True], "got True (entry 0)"),
        (["a cat"], "labels 0..9 for this class-conditional pipeline, got 'a cat' (entry 0)"),
    ],
)
def test_labels_that_are_none_are_refused(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        labels(source)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("gone.txt", None, "is no file: there is none"),
        ("folder.txt", ..., "is no file: it is a folder"),
        ("list.pdf", b"a", "must be a .txt file"),
        ("empty.txt", b"", "has no line that is not blank"),
        ("blank.txt", b" \n\t\n\r\n", "has no line that is not blank"),
        (
            "latin.txt",
            "ok\ncaf\u00e9\n".encode("latin-1"),
            "UTF-8, got byte 0xe9 at byte 6 (line 2)",
        ),
        ("wide.txt", "a cat".encode("utf-16"), "UTF-8, got byte 0xff at byte 0 (line 1)"),
    ],
)
def test_files_that_hold_none_are_refused(tmp_path, name, data, message):
    path = tmp_path / name
    if data is ...:
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    for read in (texts, labels):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(path)


def test_a_line_that_is_no_label_is_named(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("1\n\n2.5\n")
    with pytest.raises(ValueError, match=r"labels 0\.\.9, or names of classes.*'2.5' \(line 3 of"):
        labels(path, names={"tench": 0})
    path.write_text("1\n2\n99\n")
    with pytest.raises(ValueError, match=r"in 0\.\.9, got 99 \(line 3 of"):
        labels(path)


def text_call(self, prompt, height=None, guidance_scale=7.0, num_inference_steps=28,
              generator=None, output_type="pil"):  # fmt: skip
    pass


def distilled_call(self, prompt, num_inference_steps=1, generator=None):
    pass


def unconditional_call(self, batch_size=1):
    pass


def test_what_a_call_takes():
    assert condition_argument(text_call) == "prompt"
    with pytest.raises(ValueError, match="takes class_labels or prompt.*got one that takes self"):
        condition_argument(unconditional_call)
    config = TrajectoryConfig(guidance_scale=0.0, options={"height": 512})
    wanted = {"height": 512, "guidance_scale": 0.0, "output_type": "latent"}
    assert call_options(text_call, config) == wanted
    assert call_options(distilled_call, TrajectoryConfig()) == {}
    with pytest.raises(ValueError, match="guidance_scale must be left out for this pipeline"):
        call_options(distilled_call, TrajectoryConfig(guidance_scale=1.0))
    for name in ("width", "generator", "prompt", "output_type"):
        with pytest.raises(ValueError, match=f"among guidance_scale, height for .*, got '{name}'"):
            call_options(text_call, TrajectoryConfig(options={name: 1}))
