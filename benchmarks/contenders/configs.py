# SPDX-License-Identifier: Apache-2.0
"""Networks of known sizes, untrained: timing needs the shapes of a checkpoint, not its weights.

No weight is zero: matrix products of zeros draw less power, and run faster, than real ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

__all__ = ["CONFIGS", "Networks", "untrained"]


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks from tokens to image; `texts` has one text encoder, or two for SDXL."""

    unet: UNet2DConditionModel
    texts: list[CLIPTextModel | CLIPTextModelWithProjection]
    vae: AutoencoderKL


_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
}
_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "vocab_size": 49408,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_KL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}

#: The configs of the published checkpoints: UNet, text encoders, autoencoder.
CONFIGS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "sd15": ({"sample_size": 64, "cross_attention_dim": 768}, [_CLIP_L], _KL),
    "sdxl": (
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": (
                "DownBlock2D",
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
            ),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        [_CLIP_L, _CLIP_G],
        _KL | {"scaling_factor": 0.13025},
    ),
    "tiny": (
        {
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        },
        [
            {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vocab_size": 64,
                "bos_token_id": 62,
                "eos_token_id": 63,
            }
        ],
        {
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
        },
    ),
}


def untrained(name: str, device: torch.device, dtype: torch.dtype) -> Networks:
    """Return the networks of an entry of `CONFIGS`, with the initial weights of their classes."""
    unet, texts, vae = CONFIGS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Networks(
                UNet2DConditionModel(**unet).eval(),
                [_text(config) for config in texts],
                AutoencoderKL(**vae).eval(),
            )
    finally:
        torch.set_default_dtype(before)


def _text(config: dict[str, Any]) -> CLIPTextModel | CLIPTextModelWithProjection:
    kind = CLIPTextModelWithProjection if "projection_dim" in config else CLIPTextModel
    return kind(CLIPTextConfig(**config)).eval()
