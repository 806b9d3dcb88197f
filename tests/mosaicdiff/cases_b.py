"""Tiny denoisers with attention to the text apart: PixArt, U-Nets, Wan, Sana, LTX."""

import torch
from diffusers import (
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)

TEXT = 5


def _random(*shape, seed=21):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _louder(model, *names, std=0.4):
    """Scale up what a fresh model starts too small for its blocks to matter."""
    torch.manual_seed(23)
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            torch.nn.init.normal_(parameter, std=std)
    return model.eval().requires_grad_(False)


def tiny_pixart(sample_size=8, **options):
    """PixArt-sigma; alpha of 1024 pixels is `use_additional_conditions=True`."""
    torch.manual_seed(22)
    model = PixArtTransformer2DModel(
        **{
            "num_attention_heads": 4, "attention_head_dim": 6, "in_channels": 2, "out_channels": 4,
            "num_layers": 2, "cross_attention_dim": 24, "sample_size": sample_size,
            "caption_channels": 12, "use_additional_conditions": False,
        } | options
    )  # fmt: skip
    return _louder(model, "scale_shift_table", "to_out.0.weight", "to_out.0.bias", "net.2.weight")


def pixart_batch(rows=2):
    latents = _random(rows, 2, 8, 8)
    mask = torch.ones(rows, TEXT, dtype=torch.long)
    mask[1, 3:] = 0
    inputs = {"encoder_hidden_states": _random(rows, TEXT, 12), "encoder_attention_mask": mask}
    return latents, torch.full((rows,), 640), inputs


def pixart_alpha_batch(rows=2):
    latents, timesteps, inputs = pixart_batch(rows)
    sizes = {"resolution": torch.full((rows, 2), 64.0), "aspect_ratio": torch.ones(rows, 1)}
    return latents, timesteps, inputs | sizes


def tiny_unet(**options):
    """SD 1.5 with two levels; its heads have other widths at each level."""
    torch.manual_seed(24)
    model = UNet2DConditionModel(
        **{
            "sample_size": 8, "in_channels": 2, "out_channels": 2, "layers_per_block": 1,
            "block_out_channels": (12, 24), "norm_num_groups": 4, "attention_head_dim": 3,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 12,
        } | options
    )  # fmt: skip
    return _louder(model, "to_out.0.weight", "to_out.0.bias", "net.2.weight")


def tiny_sdxl(**options):
    """SDXL: its heads are counted for each level, its middle has two blocks."""
    return tiny_unet(
        **{
            "block_out_channels": (12, 24), "attention_head_dim": (3, 4),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 7 + 6 * 4,
        } | options
    )  # fmt: skip


def unet_batch(rows=2):
    return (
        _random(rows, 2, 8, 8),
        torch.full((rows,), 640),
        {"encoder_hidden_states": _random(rows, TEXT, 12)},
    )


def sdxl_batch(rows=2):
    latents, timesteps, inputs = unet_batch(rows)
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64], [64, 48, 0, 8, 64, 64]])
    ids = ids.repeat(rows // 2, 1)
    return latents, timesteps, inputs | {"text_embeds": _random(rows, 7), "time_ids": ids}


def tiny_wan(**options):
    """Wan 2.1 from text; heads of 12, for the axes of time, height and width."""
    torch.manual_seed(25)
    model = WanTransformer3DModel(
        **{
            "num_attention_heads": 3, "attention_head_dim": 12, "in_channels": 2,
            "out_channels": 2, "text_dim": 10, "freq_dim": 8, "ffn_dim": 16, "num_layers": 2,
            "rope_max_seq_len": 64,
        } | options
    )  # fmt: skip
    model = _louder(model, "scale_shift_table", "to_out.0.weight", "to_out.0.bias", "net.2.weight")
    return _louder(model, "norm_q", "norm_k", "norm_added_k", std=1.0)


def tiny_wan_picture(**options):
    """Wan 2.1 from a picture: its encoding is attended to, its latents come beside."""
    return tiny_wan(**{"in_channels": 5, "image_dim": 6, "added_kv_proj_dim": 36} | options)


def wan_batch(rows=2):
    inputs = {"encoder_hidden_states": _random(rows, TEXT, 10)}
    return _random(rows, 2, 3, 4, 4), torch.full((rows,), 640.0), inputs


def wan_picture_batch(rows=2):
    inputs = {
        "encoder_hidden_states": _random(rows, 512, 10),
        "encoder_hidden_states_image": _random(rows, 3, 6),
        "beside": _random(rows, 3, 3, 4, 4),
    }
    return _random(rows, 2, 3, 4, 4), torch.full((rows,), 640.0), inputs


def tiny_sana(**options):
    """Sana; 1.5 is `qk_norm="rms_norm_across_heads"`. The two attentions have other heads."""
    torch.manual_seed(26)
    model = SanaTransformer2DModel(
        **{
            "num_attention_heads": 4, "attention_head_dim": 6, "num_cross_attention_heads": 3,
            "cross_attention_head_dim": 8, "cross_attention_dim": 24, "caption_channels": 10,
            "in_channels": 2, "out_channels": 2, "num_layers": 2, "sample_size": 6,
            "mlp_ratio": 1.25, "timestep_scale": 0.5,
        } | options
    )  # fmt: skip
    return _louder(
        model, "scale_shift_table", "to_out.0.weight", "to_out.0.bias", "conv_", ".norm_q.",
        ".norm_k.",
    )  # fmt: skip


def sana_batch(rows=2):
    mask = torch.ones(rows, TEXT, dtype=torch.long)
    mask[1, 3:] = 0
    inputs = {"encoder_hidden_states": _random(rows, TEXT, 10), "encoder_attention_mask": mask}
    return _random(rows, 2, 6, 6), torch.full((rows,), 640.0), inputs


def tiny_ltx(**options):
    """LTX-Video; one channel of its rotary table is padding, as 32 is no multiple of 6."""
    torch.manual_seed(27)
    model = LTXVideoTransformer3DModel(
        **{
            "num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 32,
            "caption_channels": 10, "in_channels": 3, "out_channels": 3, "num_layers": 2,
        } | options
    )  # fmt: skip
    model = _louder(model, "scale_shift_table", "to_out.0.weight", "to_out.0.bias", "net.2.weight")
    return _louder(model, "norm_q", "norm_k", std=1.0)


def ltx_batch(rows=2):
    mask = torch.ones(rows, TEXT, dtype=torch.long)
    mask[1, 3:] = 0
    sizes = zip(("num_frames", "height", "width"), (2, 3, 4), strict=True)
    inputs = {
        "encoder_hidden_states": _random(rows, TEXT, 10),
        "encoder_attention_mask": mask,
        **{name: torch.full((rows,), size) for name, size in sizes},
        "rope_interpolation_scale": torch.tensor([[0.32, 32.0, 32.0]]).expand(rows, 3),
    }
    return _random(rows, 24, 3), torch.full((rows,), 640.0), inputs
