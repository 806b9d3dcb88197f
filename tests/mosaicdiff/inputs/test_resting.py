"""Text encoders leave an accelerator once they are done, and come back."""

import pytest
import torch

from mosaicdiff.inputs.resting import encoders, encoders_at_rest

from ..tiny_pipelines import PIPELINES


@pytest.fixture
def pipe(tmp_path):
    return PIPELINES["sdxl"].whole(tmp_path / "words")


def places(pipe):
    return {
        name: next(module.parameters()).device.type
        for name, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
    }


def test_on_the_cpu_nothing_is_moved(pipe):
    before = {name: p.data_ptr() for name, p in pipe.text_encoder.named_parameters()}
    assert encoders(pipe) == {}
    with encoders_at_rest(pipe):
        assert {n: p.data_ptr() for n, p in pipe.text_encoder.named_parameters()} == before
    with encoders_at_rest(None):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_text_encoders_alone_are_moved_and_come_back(pipe):
    pipe.to("cuda")
    assert set(encoders(pipe)) == {"text_encoder", "text_encoder_2"}
    with pytest.raises(KeyboardInterrupt), encoders_at_rest(pipe):
        moved = places(pipe)
        raise KeyboardInterrupt
    assert moved == {
        "vae": "cuda", "text_encoder": "cpu", "text_encoder_2": "cpu", "unet": "cuda",
    }  # fmt: skip
    assert set(places(pipe).values()) == {"cuda"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_accelerate_places_stays(pipe):
    pytest.importorskip("accelerate", reason="offloading is accelerate's")
    pipe.enable_model_cpu_offload()
    assert encoders(pipe) == {}
