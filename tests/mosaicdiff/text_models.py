"""Tiny text encoders with tokenizers of a tiny vocabulary, and a whole SD3 pipeline."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
#: Tokens of a prompt to CLIP: ends, letters, a few whole words.
_CLIP_LENGTH = 12


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a vocabulary of letters and a few words into a new folder, and read it."""
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    words = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS)]
    words += [merge.replace(" ", "") for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=_CLIP_LENGTH)


def clip(
    tokenizer: CLIPTokenizer,
    width: int,
    pooled: int,
    kind: type[CLIPTextModel | CLIPTextModelWithProjection] = CLIPTextModelWithProjection,
) -> CLIPTextModel | CLIPTextModelWithProjection:
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=pooled,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=_CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=4.0,  # so that prompts differ
        )  # fmt: skip
    ).eval()


def t5_tokenizer(folder: Path) -> T5TokenizerFast:
    """Write a vocabulary of letters and two words into a new folder, and read it."""
    words = ["<pad>", "</s>", "<unk>", "\u2581", *_LETTERS, "\u2581cat", "\u2581dog"]
    scores = [0.0 if word.startswith("<") else -1.0 / len(word) for word in words]
    tokenizer = Tokenizer(models.Unigram(list(zip(words, scores, strict=True)), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0)


def t5(width: int = 12, multilingual: bool = False) -> T5EncoderModel | UMT5EncoderModel:
    """An encoder of T5, or of UMT5 where `multilingual`."""
    config, kind = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    return kind(
        config(
            vocab_size=64,
            d_model=width,
            d_kv=4,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
    ).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, for the decoders that newer families take as text encoders."""
    words = ["<pad>", "</s>", "<unk>", "<bos>", *_LETTERS, "cat", "dog", "user", "assistant"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<bos>",
    )


def gemma2(width: int = 12) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            initializer_range=0.5,  # so that prompts differ
        )  # fmt: skip
    ).eval()


def qwen_vl(width: int = 16) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.5,  # so that prompts differ
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6,
        },
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    vision["out_hidden_size"] = width
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def whole_sd3(pipeline: StableDiffusion3Pipeline, folder: Path) -> StableDiffusion3Pipeline:
    """Give a pipeline without text encoders two of CLIP and one of T5, always the same.

    Args:
        pipeline: whose denoiser takes encodings 12 wide and pooled ones 10 wide.
        folder: where the vocabularies are written.
    """
    torch.manual_seed(14)
    tokenizers = [clip_tokenizer(folder / name) for name in ("clip", "clip-2")]
    parts = {name: getattr(pipeline, name) for name in ("transformer", "vae", "scheduler")}
    tokens, encoder = t5_tokenizer(folder / "t5"), t5()
    whole = StableDiffusion3Pipeline(
        **parts,
        tokenizer=tokenizers[0], text_encoder=clip(tokenizers[0], 4, 4),
        tokenizer_2=tokenizers[1], text_encoder_2=clip(tokenizers[1], 6, 6),
        tokenizer_3=tokens, text_encoder_3=encoder,
    )  # fmt: skip
    whole.set_progress_bar_config(disable=True)
    return whole
