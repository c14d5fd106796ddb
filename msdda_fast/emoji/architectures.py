# SPDX-License-Identifier: Apache-2.0
"""Untrained components of a small Stable Diffusion, of stock diffusers and transformers classes."""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import TypeAlias

from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 24
TEXT_WIDTH = 96
Autoencoder: TypeAlias = AutoencoderTiny


def word_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """Build a CLIP tokenizer with one token per given word; other words split into characters."""
    # A pair that one word merges can break another up (the "bl" of black in table): such words
    # merge first.
    order = sorted(set(words), key=lambda word: (-len(word), word))
    for _ in order:
        tokenizer = _bpe(order)
        split = [word for word in order if len(tokenizer(word).input_ids) > 3]
        if not split:
            return tokenizer
        order = split + [word for word in order if word not in split]
    raise ValueError(f"no merge order keeps these words whole: {split}")


def _bpe(words: list[str]) -> CLIPTokenizer:
    alphabet = list(string.printable[:94])
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
            symbols[:2] = ["".join(pair)]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    # transformers 5 ignores vocab_file=/merges_file= here without a word, hence the objects.
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def small_text_encoder(tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH) -> CLIPTextModel:
    """Build a two-layer CLIP text encoder for the tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def small_vae() -> AutoencoderTiny:
    """Build the autoencoder: factor 4, four latent channels, 0.26 M parameters."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=4,
    )


def small_unet() -> UNet2DConditionModel:
    """Build the denoiser: 16x16 latents, cross-attention at 8x8 and 4x4, 8.5 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # diffusers: the number of heads
        norm_num_groups=16,
    )


def sd15_scheduler() -> DDIMScheduler:
    """Build the DDIM scheduler with Stable Diffusion 1.5's flags (the fused step is linear)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="leading",
    )


def assemble(
    vae: AutoencoderTiny,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    """Assemble the components into a stock pipeline without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=sd15_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
