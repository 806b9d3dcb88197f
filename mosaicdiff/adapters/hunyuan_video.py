"""HunyuanVideo: `HunyuanVideoTransformer3DModel`, blocks of two streams and then of one."""

from __future__ import annotations

from collections.abc import Mapping

from ..groups import Denoiser
from .attentions import LEGACY
from .declared import Family
from .family import Blocks, Neurons
from .inputs import Condition
from .single import check_channels

#: 129 frames of 720x1280 pixels: 4 frames a latent after the first, 8 pixels.
LATENT_FRAMES, LATENT_ROWS, LATENT_COLUMNS = 33, 90, 160
#: Text tokens of `HunyuanVideoPipeline` by default.
TEXT_TOKENS = 256

_BOTH = "image+text"


class HunyuanVideoAdapter(Family):
    """Remove heads and neurons of blocks of two streams, and of parallel blocks of one.

    The refiner of the text encodings stays whole: it runs on a few hundred tokens.
    """

    denoiser_class = "HunyuanVideoTransformer3DModel"
    pipelines = ("HunyuanVideoPipeline",)
    summary = (
        "heads of joint attention and FFN neurons of both streams; heads and neurons of parallel "
        "blocks"
    )
    norms = "per head: exact"
    processors = ("HunyuanVideoAttnProcessor2_0", "AttnProcessor2_0")
    leaves = (
        ("x_embedder*", "patch embedder: its rows are the residual stream"),
        ("context_embedder*", "refiner of the text encodings: a few hundred tokens"),
        ("time_text_embed*", "embedder of timestep, guidance and pooled text"),
        ("*transformer_blocks.*.attn.norm_*", "norms over the channels of one head"),
        ("*transformer_blocks.*.norm*", "modulation and norms: as wide as the residual stream"),
        ("norm_out*", "modulation: as wide as the residual stream"),
        ("proj_out*", "output head: its columns are the residual stream"),
    )
    timestep_argument = ("timestep", 1)
    joint = True
    joint_layers = ("attn",)
    sigma_scale = 1000.0
    passes_sigmas = True
    any_size = True
    conditions = (
        Condition("encoder_hidden_states", ("text", "text_embed_dim")),
        Condition("encoder_attention_mask", ("text",), whole_numbers=True, example=1.0),
        Condition("pooled_projections", ("pooled_projection_dim",)),
        Condition("guidance", when="guidance_embeds", null=False),
    )
    block_kinds = (
        Blocks(
            "transformer_blocks.*",
            (
                LEGACY.joint_attention(),
                Neurons("ff", ("net.0.proj",), "net.2", "image"),
                Neurons("ff_context", ("net.0.proj",), "net.2", "text"),
            ),
        ),
        Blocks(
            "single_transformer_blocks.*",
            (
                LEGACY.heads(
                    "attn",
                    writers=((_BOTH, ("to_q", "to_k", "to_v")),),
                    readers=((_BOTH, "/proj_out"),),
                    attends=((_BOTH, _BOTH),),
                ),
                Neurons("mlp", ("proj_mlp",), "proj_out", _BOTH, home_name="."),
            ),
            packed={"proj_out": ("attn", "mlp")},
        ),
    )

    def check(self, denoiser: Denoiser) -> None:
        check_channels(denoiser)
        kind = denoiser.config.image_condition_type
        if kind is not None:
            raise ValueError(
                f"prune: image_condition_type must be None, got {kind!r}. HunyuanVideo from images "
                "is not handled: what it is given is not all noised."
            )
        super().check(denoiser)

    def tokens(self, denoiser: Denoiser) -> Mapping[str, int]:
        config = denoiser.config
        frames = LATENT_FRAMES // config.patch_size_t
        area = (LATENT_ROWS // config.patch_size) * (LATENT_COLUMNS // config.patch_size)
        return {"image": frames * area, "text": TEXT_TOKENS}

    def latent_shape(self, denoiser: Denoiser) -> tuple[int, ...]:
        return denoiser.config.in_channels, LATENT_FRAMES, LATENT_ROWS, LATENT_COLUMNS
