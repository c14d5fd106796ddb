# SPDX-License-Identifier: Apache-2.0
"""Denoisers of several families with random weights and adapters, and arguments of one step.

Sizes: "real" is a published config at the size of its images; "cpu" has the widths of a published
one, few layers and 256 tokens of image, and at least 100 million parameters; "tiny" runs in
milliseconds. Adapters are on the layers of attention and feed-forward, as in the training scripts
of diffusers and of Flow-GRPO.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.contenders.configs import CONFIGS

__all__ = ["FAMILIES", "SIZES", "Denoiser", "load"]

SIZES = ("tiny", "cpu", "real")
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("ffn.net.0.proj", "ffn.net.2"),
)


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A network with adapters and the arguments of its forward for one image.

    Attributes:
        network: In evaluation, with peft layers.
        adapters: Their names.
        arguments: Those of one step; guidance branches, where a family has them in one batch, are
            rows.
        parameters: Of the network without adapters.
    """

    network: nn.Module
    adapters: tuple[str, ...]
    arguments: Mapping[str, Any]
    parameters: int


@dataclass(frozen=True, slots=True)
class Family:
    """A class of networks, its configs by size, and its arguments for a size."""

    kind: type[nn.Module]
    configs: Mapping[str, Mapping[str, Any]]
    arguments: Callable[[Mapping[str, Any], str], dict[str, Any]]


def load(
    name: str, size: str, *, count: int, rank: int, device: torch.device, dtype: torch.dtype
) -> Denoiser:
    """Make the denoiser of a family, with `count` adapters of rank `rank`.

    Args:
        name: Of `FAMILIES`.
        size: Of `SIZES`.
    """
    family, before = FAMILIES[name], torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            network = family.kind(**family.configs[size])
            arguments = family.arguments(network.config, size)
    finally:
        torch.set_default_dtype(before)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    names = tuple(f"objective{m}" for m in range(count))
    for adapter in names:
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), init_lora_weights=False
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, network, adapter)
    return Denoiser(network.eval().requires_grad_(False), names, arguments, parameters)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _sd3(config: Mapping[str, Any], size: str) -> dict[str, Any]:
    side, text = {"tiny": (8, 7), "cpu": (32, 64), "real": (128, 333)}[size]
    return {
        "hidden_states": _drawn(2, config["in_channels"], side, side),  # with and without prompt
        "encoder_hidden_states": _drawn(2, text, config["joint_attention_dim"]),
        "pooled_projections": _drawn(2, config["pooled_projection_dim"]),
        "timestep": torch.full((2,), 500.0),
        "return_dict": False,
    }


def _flux(config: Mapping[str, Any], size: str) -> dict[str, Any]:
    side, text = {"tiny": (4, 7), "cpu": (16, 64), "real": (64, 512)}[size]
    ids = torch.zeros(side * side, 3)
    ids[:, 1] = torch.arange(side * side) // side
    ids[:, 2] = torch.arange(side * side) % side
    return {
        "hidden_states": _drawn(1, side * side, config["in_channels"]),
        "encoder_hidden_states": _drawn(1, text, config["joint_attention_dim"]),
        "pooled_projections": _drawn(1, config["pooled_projection_dim"]),
        "timestep": torch.full((1,), 0.5),
        "guidance": torch.full((1,), 3.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def _sdxl(config: Mapping[str, Any], size: str) -> dict[str, Any]:
    side, text = {"tiny": (8, 7), "cpu": (16, 77), "real": (128, 77)}[size]
    times = 6 * config["addition_time_embed_dim"]
    pooled = config["projection_class_embeddings_input_dim"] - times
    return {
        "sample": _drawn(2, 4, side, side),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": _drawn(2, text, config["cross_attention_dim"]),
        "added_cond_kwargs": {
            "text_embeds": _drawn(2, pooled),
            "time_ids": torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]] * 2),
        },
        "return_dict": False,
    }


def _wan(config: Mapping[str, Any], size: str) -> dict[str, Any]:
    frames, height, width, text = {
        "tiny": (1, 8, 8, 7), "cpu": (1, 32, 32, 64), "real": (21, 60, 104, 512),
    }[size]  # fmt: skip
    return {
        "hidden_states": _drawn(1, config["in_channels"], frames, height, width),
        "timestep": torch.full((1,), 500),
        "encoder_hidden_states": _drawn(1, text, config["text_dim"]),
        "return_dict": False,
    }


_SD35_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
_FLUX_DEV = {"guidance_embeds": True}
_WAN_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_SDXL = CONFIGS["sdxl"][0]
_TINY_SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}

FAMILIES = {
    "sd3": Family(
        diffusers.SD3Transformer2DModel,
        {
            "tiny": {
                "sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
                "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32,
                "pooled_projection_dim": 64,
            },
            "cpu": _SD35_MEDIUM | {"num_layers": 2, "dual_attention_layers": (0,)},
            "real": _SD35_MEDIUM,
        },
        _sd3,
    ),
    "flux": Family(
        diffusers.FluxTransformer2DModel,
        {
            "tiny": {
                "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
                "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
                "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
            },
            "cpu": _FLUX_DEV
            | {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 12},
            "real": _FLUX_DEV,
        },
        _flux,
    ),
    "sdxl": Family(
        diffusers.UNet2DConditionModel,
        {
            "tiny": CONFIGS["tiny"][0] | _TINY_SDXL,
            "cpu": _SDXL
            | {
                "block_out_channels": (320, 640),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2),
                "attention_head_dim": (5, 10),
            },
            "real": _SDXL,
        },
        _sdxl,
    ),
    "wan": Family(
        diffusers.WanTransformer3DModel,
        {
            "tiny": {
                "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
                "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 1,
            },
            "cpu": _WAN_1B | {"num_layers": 3},
            "real": _WAN_1B,
        },
        _wan,
    ),
}  # fmt: skip
