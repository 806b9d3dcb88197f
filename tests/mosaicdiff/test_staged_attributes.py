"""What pipelines read of a denoiser beside its call, they read of a staged one too."""

import pytest

from mosaicdiff import PruneConfig
from mosaicdiff.pipeline import cut

from .tiny_pipelines import PIPELINES, ddim, flow_euler, tiny_flux, tiny_unet

pytestmark = pytest.mark.models

CONFIG = PruneConfig(sparsity=0.3, allocation="score", stages=2, steps=4)


def test_modules_that_all_stages_share_are_there():
    denoiser = tiny_unet()
    staged = cut(denoiser, CONFIG, scheduler=ddim())
    assert staged.add_embedding is denoiser.add_embedding
    assert staged.config.addition_time_embed_dim == 4
    assert len({id(stage) for stage in staged.stage_models}) == 2


def test_what_is_one_stages_own_is_not():
    staged = cut(tiny_unet(), CONFIG, scheduler=ddim())
    for name in ("down_blocks", "set_attn_processor", "nothing", "_private"):
        with pytest.raises(AttributeError, match=name):
            getattr(staged, name)


def test_every_stage_hears_which_call_comes():
    staged = cut(tiny_flux(), CONFIG, scheduler=flow_euler())
    heard = []
    for stage in staged.stage_models:
        original = stage.cache_context

        def note(name, original=original):
            heard.append(name)
            return original(name)

        stage.cache_context = note
    with staged.cache_context("cond"):
        assert heard == ["cond", "cond"]
    assert PIPELINES["flux"].denoiser_class == staged.info.base_class
