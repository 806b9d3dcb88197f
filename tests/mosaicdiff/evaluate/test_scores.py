"""Scores of other packages, on tiny models of theirs with random weights."""

import sys

import pytest
import torch

from mosaicdiff.evaluate.networks import feature_network
from mosaicdiff.evaluate.scores import ClipScore, ImageRewardScore, Lpips

PROMPTS = ["cat", "dog", "c0"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP with a tokenizer and a processor, as a folder that transformers loads."""
    transformers = pytest.importorskip("transformers", reason="CLIP is of transformers")
    from ..text_models import _CLIP_LENGTH, clip_tokenizer

    place = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer(place / "words")
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8,
            "max_position_embeddings": _CLIP_LENGTH, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
            "initializer_factor": 4.0,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 8,
        },
        projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.CLIPModel(config).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(place / "model")
    return place / "model"


def test_clip_score_is_the_likeness_of_picture_and_prompt(clip_folder):
    import transformers

    score = ClipScore(str(clip_folder))
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    found = [score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    assert score(images, PROMPTS) == pytest.approx(sum(found) / 3, abs=1e-4)
    assert len(set(found)) == 3 and all(0 <= value <= 100 for value in found)
    # Written out: features of both towers, normalised, of pictures as CLIP normalises them.
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    tokens = transformers.CLIPTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding="max_length", max_length=12, return_tensors="pt"
    )
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    pixels = (((images + 1) * 127.5).round() / 255 - mean) / deviation
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
        cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds)
    assert score(images, PROMPTS) == pytest.approx(
        float(100 * cosine.clamp_min(0).mean()), abs=0.01
    )


def test_clip_score_cuts_long_prompts_and_takes_grey_pictures(clip_folder):
    score = ClipScore(str(clip_folder))
    assert 0 <= score(torch.zeros(1, 1, 16, 16), ["cat " * 40]) <= 100


def test_a_clip_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--clip-score must be a CLIP model .*nothing"):
        ClipScore(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "module, package, make",
    [
        ("ImageReward", "image-reward", ImageRewardScore),
        ("lpips", "lpips", Lpips),
        ("transformers", "transformers", lambda: ClipScore("any")),
        (
            "torch_fidelity.feature_extractor_inceptionv3",
            "torch-fidelity",
            lambda: feature_network("inception"),
        ),
    ],
)
def test_a_missing_package_is_refused_with_its_cure(monkeypatch, module, package, make):
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises, installed or not
    with pytest.raises(ValueError, match=f"needs the package {package}.*pip install {package}"):
        make()


def test_lpips_of_a_random_trunk():
    package = pytest.importorskip("lpips", reason="needs lpips", exc_type=ImportError)
    torch.manual_seed(0)
    model = package.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
    distance = Lpips("alex", model=model)
    a, b = torch.rand(2, 1, 64, 64) * 2 - 1, torch.rand(2, 1, 64, 64) * 2 - 1
    assert distance(a, a) == 0 < distance(a, b)
    parts = [distance(a[i : i + 1], b[i : i + 1]) for i in range(2)]
    assert distance(a, b) == pytest.approx(sum(parts) / 2, rel=1e-4)
    assert distance.metric.name == "lpips" and distance.metric.network == "alex"
