"""`generate --lora`, and what pipelines' own loaders say of a pruned model."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import mosaicdiff

from ..commands import refused, run_json
from ..conftest import tiny_batches, tiny_denoiser, tiny_pipeline
from ..tiny_pipelines import PIPELINES, flow_dynamic, tiny_flux

Q = "transformer_blocks.0.attn1.to_q"


@pytest.fixture
def folder(tmp_path):
    pipe = tiny_pipeline(tiny_denoiser())
    config = mosaicdiff.PruneConfig(sparsity=0.4, samples=48, steps=20)
    mosaicdiff.prune(pipe, config, calibration=tiny_batches())
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path


def picture(folder, name, *options):
    """The picture that `generate` draws, as numbers."""
    asked = ("--classes", "3,1", "--steps", 4, *options, "--output", folder / name)
    run_json("generate", folder / "model", *asked)
    return np.asarray(Image.open(folder / name), dtype=int)


def test_generate_with_a_lora(folder):
    lora = {f"{Q}.lora_A.weight": torch.ones(2, 32), f"{Q}.lora_B.weight": torch.ones(32, 2)}
    lora |= {
        "proj_out_2.lora_A.weight": torch.ones(2, 32),
        "proj_out_2.lora_B.weight": torch.ones(8, 2),
    }
    save_file(lora, folder / "lora.safetensors")
    plain = picture(folder, "plain.png")
    changed = picture(folder, "lora.png", "--lora", folder / "lora.safetensors")
    none = picture(folder, "none.png", "--lora", folder / "lora.safetensors", "--lora-scale", 0)
    assert (changed != plain).any() and (none == plain).all()


@pytest.mark.parametrize(
    "message, options",
    [
        ("--lora must be a .safetensors file", ("--lora", "other.safetensors")),
        ("--lora-scale must be left out without --lora", ("--lora-scale", 0.5)),
        ("--stage-memory must be resident with --lora", ("--lora", None, "--stage-memory", "swap")),
        ("scale must be finite, got nan", ("--lora", None, "--lora-scale", "nan")),
    ],
)
def test_what_does_not_go_together(folder, message, options):
    save_file({f"{Q}.lora_A.weight": torch.ones(2, 32), f"{Q}.lora_B.weight": torch.ones(32, 2)},
              folder / "lora.safetensors")  # fmt: skip
    options = [folder / "lora.safetensors" if o is None else o for o in options]
    output = ("--output", folder / "x.png")
    refused(message, "generate", folder / "model", *options, *output)


@pytest.mark.models
def test_the_pipelines_own_loader_names_ours(tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    tiny = PIPELINES["flux"]
    pipe = tiny.whole(tmp_path / "words")
    config = mosaicdiff.PruneConfig(sparsity=0.3, allocation="score", stages=2, steps=4)
    pipe.transformer = mosaicdiff.pipeline.cut(tiny_flux(), config, scheduler=flow_dynamic())
    name = "transformer.transformer_blocks.0.attn.to_q"
    lora = {f"{name}.lora_A.weight": torch.ones(2, 24), f"{name}.lora_B.weight": torch.ones(24, 2)}
    with pytest.raises(ValueError, match=r"Call mosaicdiff\.load_lora\(pipe, \.\.\.\)"):
        pipe.load_lora_weights(lora)
    mosaicdiff.load_lora(pipe, lora)


@pytest.mark.models
@pytest.mark.parametrize("name", ["flux", "sdxl", "sd3"])
def test_layouts_that_pipelines_convert(name, tmp_path):
    """The same LoRA by diffusers' names and by kohya's gives the same pictures."""
    tiny = PIPELINES[name]
    pipe = tiny.whole(tmp_path / "words")
    config = mosaicdiff.PruneConfig(sparsity=0.3, allocation="score", stages=2, steps=4)
    denoiser = getattr(pipe, tiny.component)
    module = next(
        n for n, m in denoiser.named_modules() if n.endswith("to_q") and hasattr(m, "weight")
    )
    rows, columns = denoiser.get_submodule(module).weight.shape
    staged = mosaicdiff.pipeline.cut(denoiser, config, scheduler=tiny.schedulers[0]())
    setattr(pipe, tiny.component, staged)
    generator = torch.manual_seed(3)
    down, up = torch.randn(2, columns, generator=generator), torch.randn(rows, 2)
    before = tiny.sample(pipe)
    named = f"{tiny.component}.{module}"
    mosaicdiff.load_lora(pipe, {f"{named}.lora_A.weight": down, f"{named}.lora_B.weight": up})
    expected = tiny.sample(pipe)
    assert (expected - before).abs().max() > 1e-4
    mosaicdiff.unload_lora(pipe)
    if name == "sdxl":
        flat = "lora_unet_" + module.replace(".", "_")
        kohya = {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_up.weight": up,
            f"{flat}.alpha": torch.tensor(2.0),
        }
    else:
        kohya = {f"{named}.lora.down.weight": down, f"{named}.lora.up.weight": up}
    mosaicdiff.load_lora(pipe, kohya)
    assert torch.allclose(tiny.sample(pipe), expected, atol=1e-5)
    mosaicdiff.unload_lora(pipe)
    text = {"text_encoder.a.lora_A.weight": down, "text_encoder.a.lora_B.weight": up}
    with pytest.raises(ValueError, match="load_lora_into_text_encoder"):
        mosaicdiff.load_lora(pipe, kohya | text)
