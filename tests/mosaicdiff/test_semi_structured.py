"""2:4 linears on sparse tensor cores: what is chosen, what is refused, and the timing loop."""

import pytest
import torch

from mosaicdiff import semi_structured
from mosaicdiff.evaluate.latency import time_networks
from mosaicdiff.semi_structured import choose_linears, to_semi_structured

from .masked import mask_denoiser


def test_no_gpu_is_told():
    staged, _ = mask_denoiser(pattern=(2, 4))
    with pytest.raises(RuntimeError, match="CUDA device of capability 8.0 .* got cpu. .*same time"):
        to_semi_structured(staged)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_the_dtype_and_the_pattern_are_asked_for(monkeypatch):
    monkeypatch.setattr(semi_structured, "check_device", lambda device: None)
    staged, _ = mask_denoiser(pattern=(2, 4))
    with pytest.raises(ValueError, match="must be float16 or bfloat16, got torch.float32"):
        to_semi_structured(staged)
    staged, _ = mask_denoiser()
    with pytest.raises(ValueError, match="must have linears that fit, got none .*not masked 2:4"):
        to_semi_structured(staged.half())


def test_linears_are_chosen_by_mask_and_size(monkeypatch):
    staged, _ = mask_denoiser(pattern=(2, 4), shares=(0.5, 0.5), only=[["*"], ["*.to_q"]])
    staged.half()
    monkeypatch.setattr(semi_structured, "_least_shape", lambda dtype: (16, 64))
    chosen, skipped = choose_linears(staged)
    assert chosen == [[f"transformer_blocks.{i}.ff.net.2" for i in range(3)], []]
    assert skipped[0]["transformer_blocks.0.attn1.to_q"] == "32 x 32 is no multiple of 16 x 64"
    assert set(skipped[1]) == {f"transformer_blocks.{i}.attn1.to_q" for i in range(3)}
    monkeypatch.undo()
    rows, columns = semi_structured._least_shape(torch.float16)
    assert rows in (16, 32) and columns in (16, 64)
    sparser, _ = mask_denoiser(pattern=(1, 4))
    assert len(choose_linears(sparser)[0][0]) == 18
    denser, _ = mask_denoiser(pattern=(3, 4))
    assert set(choose_linears(denser)[1][0].values()) == {"not masked 2:4"}


def test_calls_are_timed_in_turn():
    staged, _ = mask_denoiser(pattern=(2, 4))
    stage = staged.stage_models[0]
    times = time_networks(staged.adapter, [(stage, 10), (stage, 900)], 2, 3)
    assert [len(row) for row in times] == [3, 3] and min(map(min, times)) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_converted_model_gives_the_same(tmp_path):
    from .conftest import tiny_denoiser

    staged, _ = mask_denoiser(tiny_denoiser(heads=16), pattern=(2, 4), shares=(0.5, 0.5))
    staged.to("cuda", torch.bfloat16)
    x = torch.randn(2, 2, 8, 8, device="cuda", dtype=torch.bfloat16)
    labels = torch.tensor([1, 2], device="cuda")
    call = lambda t: staged(x, torch.tensor([t, t], device="cuda"), labels).sample  # noqa: E731
    before = [call(t) for t in (900, 30)]
    report = to_semi_structured(staged)
    assert len(report.converted[0]) == 18 and not report.skipped[0]
    assert report.gain is not None and report.gain > 0
    for old, t in zip(before, (900, 30), strict=True):
        assert (call(t) - old).float().norm() < 0.02 * old.float().norm()
    with pytest.raises(ValueError, match="must be a dense tensor"):
        staged.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="converted before"):
        to_semi_structured(staged)
