"""Tiny text encoders with tokenizers of a tiny vocabulary, and a whole SD3 pipeline of them."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
#: Tokens of a prompt to CLIP: ends, letters, a few whole words.
_CLIP_LENGTH = 12


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    words = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS)]
    words += [merge.replace(" ", "") for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=_CLIP_LENGTH)


def _clip(tokenizer: CLIPTokenizer, width: int, pooled: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
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
    )


def _t5_tokenizer(folder: Path) -> T5TokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "\u2581", *_LETTERS, "\u2581cat", "\u2581dog"]
    scores = [0.0 if word.startswith("<") else -1.0 / len(word) for word in words]
    tokenizer = Tokenizer(models.Unigram(list(zip(words, scores, strict=True)), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0)


def whole_sd3(pipeline: StableDiffusion3Pipeline, folder: Path) -> StableDiffusion3Pipeline:
    """Give a pipeline without text encoders two of CLIP and one of T5, always the same.

    Args:
        pipeline: whose denoiser takes encodings 12 wide and pooled ones 10 wide.
        folder: where the vocabularies are written.
    """
    torch.manual_seed(14)
    tokenizers = [_clip_tokenizer(folder / name) for name in ("clip", "clip-2")]
    parts = {name: getattr(pipeline, name) for name in ("transformer", "vae", "scheduler")}
    t5 = _t5_tokenizer(folder / "t5")
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=64,
            d_model=12,
            d_kv=4,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
    )
    whole = StableDiffusion3Pipeline(
        **parts,
        tokenizer=tokenizers[0], text_encoder=_clip(tokenizers[0], 4, 4).eval(),
        tokenizer_2=tokenizers[1], text_encoder_2=_clip(tokenizers[1], 6, 6).eval(),
        tokenizer_3=t5, text_encoder_3=encoder.eval(),
    )  # fmt: skip
    whole.set_progress_bar_config(disable=True)
    return whole
