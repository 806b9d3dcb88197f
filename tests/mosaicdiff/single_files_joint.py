"""Tiny models in the layouts of FLUX.2 and HunyuanVideo, written by hand."""

import torch

from .single_files import swap_halves

_IMAGE, _TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_STREAMS = (
    ("img", _IMAGE, "to_out.0", "norm_", ""),
    ("txt", _TEXT, "to_add_out", "norm_added_", "_context"),
)


def _indices(state, prefix: str) -> list[int]:
    return sorted({int(k.split(".")[1]) for k in state if k.startswith(f"{prefix}.")})


def _written(state, fused, renamed, swapped, prefix: str) -> dict[str, torch.Tensor]:
    """Write what several make, what is only renamed, and what is in the other order."""
    state, out = dict(state), {}
    for part in ("weight", "bias"):
        for theirs, names in fused.items():
            if f"{names[0]}.{part}" in state:
                out[f"{theirs}.{part}"] = torch.cat([state.pop(f"{n}.{part}") for n in names])
        for ours, theirs in renamed.items():
            if f"{ours}.{part}" in state:
                leaf = theirs if theirs.endswith(".scale") else f"{theirs}.{part}"
                out[leaf] = state.pop(f"{ours}.{part}")
        for ours, theirs in swapped.items():
            if f"{ours}.{part}" in state:
                out[f"{theirs}.{part}"] = swap_halves(state.pop(f"{ours}.{part}"))
    assert not state, list(state)
    return {prefix + name: tensor.contiguous() for name, tensor in out.items()}


def flux2_tensors(state: dict[str, torch.Tensor], prefix: str = "") -> dict:
    """Black Forest Labs' layout of FLUX.2: double blocks fuse q, k, v; single blocks are alike."""
    fused, renamed = {}, {"x_embedder": "img_in", "context_embedder": "txt_in"}
    renamed["proj_out"] = "final_layer.linear"
    for ours, theirs in (("timestep_embedder", "time_in"), ("guidance_embedder", "guidance_in")):
        renamed[f"time_guidance_embed.{ours}.linear_1"] = f"{theirs}.in_layer"
        renamed[f"time_guidance_embed.{ours}.linear_2"] = f"{theirs}.out_layer"
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt",
                 "single_stream_modulation"):  # fmt: skip
        renamed[f"{name}.linear"] = f"{name}.lin"
    for i in _indices(state, "transformer_blocks"):
        ours = f"transformer_blocks.{i}"
        for stream, names, out, norm, suffix in _STREAMS:
            theirs = f"double_blocks.{i}.{stream}"
            fused[f"{theirs}_attn.qkv"] = [f"{ours}.attn.{name}" for name in names]
            renamed[f"{ours}.attn.{out}"] = f"{theirs}_attn.proj"
            renamed[f"{ours}.attn.{norm}q"] = f"{theirs}_attn.norm.query_norm.scale"
            renamed[f"{ours}.attn.{norm}k"] = f"{theirs}_attn.norm.key_norm.scale"
            renamed[f"{ours}.ff{suffix}.linear_in"] = f"{theirs}_mlp.0"
            renamed[f"{ours}.ff{suffix}.linear_out"] = f"{theirs}_mlp.2"
    for i in _indices(state, "single_transformer_blocks"):
        ours, theirs = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        renamed |= {
            f"{ours}.to_qkv_mlp_proj": f"{theirs}.linear1", f"{ours}.to_out": f"{theirs}.linear2",
            f"{ours}.norm_q": f"{theirs}.norm.query_norm.scale",
            f"{ours}.norm_k": f"{theirs}.norm.key_norm.scale",
        }  # fmt: skip
    swapped = {"norm_out.linear": "final_layer.adaLN_modulation.1"}
    return _written(state, fused, renamed, swapped, prefix)


def hunyuan_tensors(state: dict[str, torch.Tensor], prefix: str = "") -> dict:
    """Tencent's layout of HunyuanVideo, its token refiner too."""
    fused, text = {}, "context_embedder"
    renamed = {
        "x_embedder.proj": "img_in.proj", f"{text}.proj_in": "txt_in.input_embedder",
        f"{text}.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
        f"{text}.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
        f"{text}.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.linear_1",
        f"{text}.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.linear_2",
        "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
        "proj_out": "final_layer.linear",
    }  # fmt: skip
    refiners = {int(k.split(".")[3]) for k in state if ".refiner_blocks." in k}
    for i in refiners:
        ours = f"{text}.token_refiner.refiner_blocks.{i}"
        theirs = f"txt_in.individual_token_refiner.blocks.{i}"
        fused[f"{theirs}.self_attn_qkv"] = [f"{ours}.attn.{name}" for name in _IMAGE]
        renamed |= {
            f"{ours}.norm1": f"{theirs}.norm1", f"{ours}.norm2": f"{theirs}.norm2",
            f"{ours}.attn.to_out.0": f"{theirs}.self_attn_proj",
            f"{ours}.ff.net.0.proj": f"{theirs}.mlp.fc1", f"{ours}.ff.net.2": f"{theirs}.mlp.fc2",
            f"{ours}.norm_out.linear": f"{theirs}.adaLN_modulation.1",
        }  # fmt: skip
    for i in _indices(state, "transformer_blocks"):
        ours = f"transformer_blocks.{i}"
        for stream, names, out, norm, suffix in _STREAMS:
            theirs = f"double_blocks.{i}.{stream}"
            fused[f"{theirs}_attn_qkv"] = [f"{ours}.attn.{name}" for name in names]
            renamed |= {
                f"{ours}.norm1{suffix}.linear": f"{theirs}_mod.linear",
                f"{ours}.attn.{out}": f"{theirs}_attn_proj",
                f"{ours}.attn.{norm}q": f"{theirs}_attn_q_norm",
                f"{ours}.attn.{norm}k": f"{theirs}_attn_k_norm",
                f"{ours}.ff{suffix}.net.0.proj": f"{theirs}_mlp.fc1",
                f"{ours}.ff{suffix}.net.2": f"{theirs}_mlp.fc2",
            }
    for i in _indices(state, "single_transformer_blocks"):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        fused[f"{theirs}.linear1"] = [f"{ours}.{name}" for name in names]
        renamed |= {
            f"{ours}.proj_out": f"{theirs}.linear2",
            f"{ours}.norm.linear": f"{theirs}.modulation.linear",
            f"{ours}.attn.norm_q": f"{theirs}.q_norm", f"{ours}.attn.norm_k": f"{theirs}.k_norm",
        }  # fmt: skip
    swapped = {"norm_out.linear": "final_layer.adaLN_modulation.1"}
    return _written(state, fused, renamed, swapped, prefix)
