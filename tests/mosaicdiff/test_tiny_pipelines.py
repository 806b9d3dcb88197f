"""The tiny pipelines are real ones: saved, loaded, asked in words."""

import pytest
import torch
from diffusers import DiffusionPipeline

from .tiny_pipelines import PIPELINES

pytestmark = pytest.mark.models


@pytest.mark.parametrize("name", PIPELINES)
def test_a_tiny_pipeline_is_whole(name, tmp_path):
    tiny = PIPELINES[name]
    pipe = tiny.whole(tmp_path / "words")
    pipe.save_pretrained(tmp_path / "model")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    pictures = []
    for scheduler in tiny.schedulers:
        pipe.scheduler, loaded.scheduler = scheduler(), scheduler()
        drawn = tiny.sample(pipe)
        assert torch.isfinite(drawn).all()
        # Loaded tensors lie elsewhere in memory, where products may be summed in another order.
        assert (drawn - tiny.sample(loaded)).abs().max() < 1e-5
        pictures.append(drawn)
    pipe.scheduler = tiny.schedulers[0]()
    assert not torch.equal(pictures[0], pictures[1])
    other = tiny.sample(pipe, "zzz 9", output_type="latent")
    own = tiny.sample(pipe, output_type="latent")
    assert (own - other).abs().max() > 1e-5  # it reads the prompt
