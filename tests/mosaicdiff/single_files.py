"""Tiny models written by hand in the layouts they are published in."""

import types
from pathlib import Path

import torch
from safetensors.torch import save_file


def swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def sd3_tensors(state: dict[str, torch.Tensor], prefix: str = "model.diffusion_model.") -> dict:
    """Stability's layout of SD3: q, k and v in one, adaLN of the last text block and the output
    in the other order."""
    state = dict(state)
    count = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks."))
    out = {"pos_embed": state.pop("pos_embed.pos_embed")}
    simple = {
        "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }  # fmt: skip
    for ours, theirs in (("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder")):
        simple[f"time_text_embed.{ours}.linear_1"] = f"{theirs}.mlp.0"
        simple[f"time_text_embed.{ours}.linear_2"] = f"{theirs}.mlp.2"
    for ours, theirs in simple.items():
        for part in ("weight", "bias"):
            out[f"{theirs}.{part}"] = state.pop(f"{ours}.{part}")
    for part in ("weight", "bias"):
        out[f"final_layer.adaLN_modulation.1.{part}"] = swap_halves(
            state.pop(f"norm_out.linear.{part}")
        )
    for i in range(count):
        block, last = f"transformer_blocks.{i}", i == count - 1
        image, text = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        fused = [
            (f"{image}.attn", f"{block}.attn", ("to_q", "to_k", "to_v")),
            (f"{text}.attn", f"{block}.attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
            (f"{image}.attn2", f"{block}.attn2", ("to_q", "to_k", "to_v")),
        ]
        renamed = {
            f"{block}.attn.to_out.0": f"{image}.attn.proj",
            f"{block}.attn.to_add_out": f"{text}.attn.proj",
            f"{block}.attn2.to_out.0": f"{image}.attn2.proj",
            f"{block}.norm1.linear": f"{image}.adaLN_modulation.1",
            f"{block}.norm1_context.linear": f"{text}.adaLN_modulation.1",
            f"{block}.attn.norm_q": f"{image}.attn.ln_q",
            f"{block}.attn.norm_k": f"{image}.attn.ln_k",
            f"{block}.attn2.norm_q": f"{image}.attn2.ln_q",
            f"{block}.attn2.norm_k": f"{image}.attn2.ln_k",
            f"{block}.attn.norm_added_q": f"{text}.attn.ln_q",
            f"{block}.attn.norm_added_k": f"{text}.attn.ln_k",
        }
        for ours, theirs in (("ff", image), ("ff_context", text)):
            renamed[f"{block}.{ours}.net.0.proj"] = f"{theirs}.mlp.fc1"
            renamed[f"{block}.{ours}.net.2"] = f"{theirs}.mlp.fc2"
        for part in ("weight", "bias"):
            for theirs, ours, names in fused:
                held = [state.pop(f"{ours}.{name}.{part}", None) for name in names]
                if held[0] is not None:
                    out[f"{theirs}.qkv.{part}"] = torch.cat(held)
            for ours, theirs in renamed.items():
                if f"{ours}.{part}" in state:
                    tensor = state.pop(f"{ours}.{part}")
                    swapped = last and "context_block.adaLN" in theirs
                    out[f"{theirs}.{part}"] = swap_halves(tensor) if swapped else tensor
    assert not state, list(state)
    return {prefix + name: tensor.contiguous() for name, tensor in out.items()}


def flux_tensors(state: dict[str, torch.Tensor], prefix: str = "") -> dict:
    """Black Forest Labs' layout of FLUX.1: q, k, v and the MLP of a single block in one."""
    state, out = dict(state), {}
    renamed = {
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
        "proj_out": "final_layer.linear",
    }
    for ours, theirs in (
        ("timestep_embedder", "time_in"), ("text_embedder", "vector_in"),
        ("guidance_embedder", "guidance_in"),
    ):  # fmt: skip
        renamed[f"time_text_embed.{ours}.linear_1"] = f"{theirs}.in_layer"
        renamed[f"time_text_embed.{ours}.linear_2"] = f"{theirs}.out_layer"
    fused = {}
    for i in {int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks.")}:
        ours = f"transformer_blocks.{i}"
        for stream, suffix, added in (
            ("img", "", ("to_q", "to_k", "to_v")),
            ("txt", "_context", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            theirs = f"double_blocks.{i}.{stream}"
            fused[f"{theirs}_attn.qkv"] = [f"{ours}.attn.{name}" for name in added]
            renamed[f"{ours}.norm1{suffix}.linear"] = f"{theirs}_mod.lin"
            renamed[f"{ours}.ff{suffix}.net.0.proj"] = f"{theirs}_mlp.0"
            renamed[f"{ours}.ff{suffix}.net.2"] = f"{theirs}_mlp.2"
            out_name = "to_add_out" if suffix else "to_out.0"
            renamed[f"{ours}.attn.{out_name}"] = f"{theirs}_attn.proj"
            for letter, key in (("q", "query"), ("k", "key")):
                norm = f"norm_added_{letter}" if suffix else f"norm_{letter}"
                renamed[f"{ours}.attn.{norm}"] = f"{theirs}_attn.norm.{key}_norm"
    for i in {int(k.split(".")[1]) for k in state if k.startswith("single_transformer_blocks.")}:
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        fused[f"{theirs}.linear1"] = [f"{ours}.{name}" for name in names]
        renamed[f"{ours}.norm.linear"] = f"{theirs}.modulation.lin"
        renamed[f"{ours}.proj_out"] = f"{theirs}.linear2"
        renamed[f"{ours}.attn.norm_q"] = f"{theirs}.norm.query_norm"
        renamed[f"{ours}.attn.norm_k"] = f"{theirs}.norm.key_norm"
    for part in ("weight", "bias"):
        out[f"final_layer.adaLN_modulation.1.{part}"] = swap_halves(
            state.pop(f"norm_out.linear.{part}")
        )
        for theirs, names in fused.items():
            out[f"{theirs}.{part}"] = torch.cat([state.pop(f"{name}.{part}") for name in names])
        for ours, theirs in renamed.items():
            if f"{ours}.{part}" in state:
                leaf = "scale" if theirs.endswith("_norm") else part
                out[f"{theirs}.{leaf}"] = state.pop(f"{ours}.{part}")
    assert not state, list(state)
    return {prefix + name: tensor.contiguous() for name, tensor in out.items()}


_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip


def unet_tensors(
    state: dict[str, torch.Tensor], layers: int, prefix: str = "model.diffusion_model."
) -> dict:
    """The LDM layout of SD1.5 and SDXL: blocks counted through, `layers` a resolution."""
    out = {}
    has_attention = {".".join(k.split(".")[:2]) for k in state if ".attentions." in k}
    for name, tensor in state.items():
        part = name.rpartition(".")[2]
        top = next((k for k in _UNET if name == f"{k}.{part}"), None)
        if top is not None:
            out[f"{_UNET[top]}.{part}"] = tensor
            continue
        bits = name.split(".")
        if bits[0] == "mid_block":
            kind, index, rest = bits[1], int(bits[2]), bits[3:]
            place = f"middle_block.{2 * index + (kind == 'attentions')}"
        else:
            block, kind, index, rest = int(bits[1]), bits[2], int(bits[3]), bits[4:]
            if bits[0] == "down_blocks":
                number = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else index)
                place = f"input_blocks.{number}.{int(kind == 'attentions')}"
            else:
                number = block * (layers + 1) + (layers if kind == "upsamplers" else index)
                after = 1 + (f"up_blocks.{block}" in has_attention)
                sub = {"resnets": 0, "attentions": 1, "upsamplers": after}[kind]
                place = f"output_blocks.{number}.{sub}"
            if kind == "downsamplers":
                rest = ["op", *rest[1:]]
        if kind == "resnets":
            rest = [_RESNET[rest[0]], *rest[1:]]
        out[f"{place}.{'.'.join(rest)}"] = tensor
    assert len(out) == len(state)
    return {prefix + name: tensor.contiguous() for name, tensor in out.items()}


def write_single_file(path: Path, tensors: dict, others: bool = True, **metadata: str) -> Path:
    """Write a file as published, with tensors of other components where `others`."""
    extra = {}
    if others:
        extra["other.weight"] = torch.arange(6, dtype=torch.float16).reshape(2, 3)
        extra["other.position_ids"] = torch.arange(5)
    save_file(tensors | extra, path, metadata={"modelspec.title": "tiny"} | metadata)
    return path


def vae_tensors(state: dict[str, torch.Tensor], prefix: str = "first_stage_model.") -> dict:
    """The LDM layout of AutoencoderKL: levels of the decoder counted down, attention as
    convolutions."""
    levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("decoder.up_blocks."))
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    out = {}
    for name, tensor in state.items():
        bits = name.split(".")
        if "mid_block" in bits:
            if "resnets" in bits:
                name = ".".join([bits[0], "mid", f"block_{int(bits[3]) + 1}", *bits[4:]])
            else:
                name = ".".join([bits[0], "mid", "attn_1", attention[bits[4]], bits[-1]])
                if tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]
        elif "down_blocks" in bits or "up_blocks" in bits:
            way = bits[1].removesuffix("_blocks")
            level = int(bits[2]) if way == "down" else levels - 1 - int(bits[2])
            kind = ["block", bits[4]] if bits[3] == "resnets" else [f"{way}sample"]
            rest = ["nin_shortcut" if b == "conv_shortcut" else b for b in bits[5:]]
            name = ".".join([bits[0], way, str(level), *kind, *rest])
        out[prefix + name.replace("conv_norm_out", "norm_out")] = tensor.contiguous()
    assert len(out) == len(state)
    return out


def with_width(function, width: int):
    """Return diffusers' conversion of FLUX, which is for one width only, for another one."""

    def changed(code: types.CodeType) -> types.CodeType:
        constants = (
            changed(c) if isinstance(c, types.CodeType) else width if c == 3072 else c
            for c in code.co_consts
        )  # fmt: skip
        return code.replace(co_consts=tuple(constants))

    return types.FunctionType(changed(function.__code__), function.__globals__, function.__name__)


def _renamed(state: dict[str, torch.Tensor], names: dict[str, str], prefix: str) -> dict:
    """Rename by parts of names, the first that are listed first, each once."""
    out = {}
    for name, tensor in state.items():
        padded = f".{name}"
        for ours, theirs in names.items():
            padded = padded.replace(f".{ours}.", f".\0{theirs}.").replace("\0", "")
        out[prefix + padded[1:]] = tensor.contiguous()
    assert len(out) == len(state)
    return out


def wan_tensors(state: dict[str, torch.Tensor], prefix: str = "") -> dict:
    """Wan's own layout: its second and third norm are diffusers' third and second."""
    embedder = "condition_embedder"
    names = {
        f"{embedder}.time_embedder.linear_1": "time_embedding.0",
        f"{embedder}.time_embedder.linear_2": "time_embedding.2",
        f"{embedder}.text_embedder.linear_1": "text_embedding.0",
        f"{embedder}.text_embedder.linear_2": "text_embedding.2",
        f"{embedder}.time_proj": "time_projection.1",
        f"{embedder}.image_embedder.norm1": "img_emb.proj.0",
        f"{embedder}.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        f"{embedder}.image_embedder.ff.net.2": "img_emb.proj.3",
        f"{embedder}.image_embedder.norm2": "img_emb.proj.4",
        "norm2": "norm3", "attn1": "self_attn", "attn2": "cross_attn",
        "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
        "add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img",
        "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "proj_out": "head.head",
    }  # fmt: skip
    out = _renamed(state, names, prefix)
    for name in list(out):
        if name.endswith("scale_shift_table"):
            theirs = "head.modulation" if name == f"{prefix}scale_shift_table" else "modulation"
            out[name.removesuffix("scale_shift_table") + theirs] = out.pop(name)
    return out


def ltx_tensors(state: dict[str, torch.Tensor], prefix: str = "model.diffusion_model.") -> dict:
    """Lightricks' layout of LTX-Video."""
    names = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm",
             "norm_k": "k_norm"}  # fmt: skip
    return _renamed(state, names, prefix)


def sana_tensors(state: dict[str, torch.Tensor], prefix: str = "") -> dict:
    """NVIDIA's layout of Sana: q, k and v in one, k and v of the cross attention too."""
    state, out = dict(state), {}
    for i in {int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks.")}:
        ours, theirs = f"transformer_blocks.{i}", f"blocks.{i}"
        fused = [state.pop(f"{ours}.attn1.to_{letter}.weight") for letter in "qkv"]
        out[f"{theirs}.attn.qkv.weight"] = torch.cat(fused)
        for part in ("weight", "bias"):
            pair = [state.pop(f"{ours}.attn2.to_{letter}.{part}") for letter in "kv"]
            out[f"{theirs}.cross_attn.kv_linear.{part}"] = torch.cat(pair)
    names = {
        "patch_embed.proj": "x_embedder.proj", "transformer_blocks": "blocks",
        "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_embed.linear": "t_block.1", "caption_norm": "attention_y_norm",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "attn1.to_out.0": "attn.proj", "attn2.to_q": "cross_attn.q_linear",
        "attn2.to_out.0": "cross_attn.proj", "ff.conv_inverted": "mlp.inverted_conv.conv",
        "ff.conv_depth": "mlp.depth_conv.conv", "ff.conv_point": "mlp.point_conv.conv",
        "proj_out": "final_layer.linear",
    }  # fmt: skip
    out |= _renamed(state, names, "")
    out["final_layer.scale_shift_table"] = out.pop("scale_shift_table")
    # Of no use to diffusers, but it looks for them.
    out |= {"pos_embed": torch.ones(1, 4, 8), "y_embedder.y_embedding": torch.ones(3, 8)}
    return {prefix + name: tensor.contiguous() for name, tensor in out.items()}
