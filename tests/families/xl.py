# SPDX-License-Identifier: Apache-2.0
"""Tiny Stable Diffusion XL pipelines: (pipeline, arguments of its call for `batch` prompts)."""

import diffusers
import torch
from torch import nn

from tests.families.parts import (
    ATTENTION,
    FEED_FORWARD,
    STABLE_DIFFUSION_NOISE,
    adapt,
    image_vae,
    normal,
    pixels,
    seeded,
)

BLOCKS = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 64,
}


def unet(in_channels: int = 4, embed: int = 80) -> nn.Module:
    network = seeded(
        diffusers.UNet2DConditionModel,
        **BLOCKS,
        sample_size=32,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        projection_class_embeddings_input_dim=embed,
    )
    convolutions = ("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out")
    linears = ("time_emb_proj", "linear_1", "linear_2")
    return adapt(network, *ATTENTION, *FEED_FORWARD, *convolutions, *linears)


def components(network: nn.Module | None = None) -> dict:
    return {
        "vae": image_vae(),
        "text_encoder": None,
        "text_encoder_2": None,
        "tokenizer": None,
        "tokenizer_2": None,
        "unet": network or unet(),
        "scheduler": diffusers.EulerAncestralDiscreteScheduler(**STABLE_DIFFUSION_NOISE),
    }


def embeddings(batch: int) -> dict:
    return {
        "prompt_embeds": normal(batch, 7, 64, seed=1),
        "negative_prompt_embeds": normal(batch, 7, 64, seed=2),
        "pooled_prompt_embeds": normal(batch, 32, seed=3),
        "negative_pooled_prompt_embeds": normal(batch, 32, seed=4),
        "guidance_scale": 5.0,
    }


SIZE = {"height": 32, "width": 32}


def text(batch: int = 2):
    pipe = diffusers.StableDiffusionXLPipeline(**components())
    return pipe, {**embeddings(batch), **SIZE, "guidance_rescale": 0.7}


def img2img(batch: int = 2):
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        **components(unet(embed=72)), requires_aesthetics_score=True
    )
    return pipe, {**embeddings(batch), "image": pixels(batch, 32), "strength": 0.8}


def inpaint(batch: int = 2, channels: int = 4):
    pipe = diffusers.StableDiffusionXLInpaintPipeline(
        **components(unet(channels)), requires_aesthetics_score=False
    )
    mask = torch.zeros(batch, 1, 32, 32)
    mask[:, :, 8:24, 4:] = 1
    image = {"image": pixels(batch, 32), "mask_image": mask, "strength": 0.9}
    return pipe, {**embeddings(batch), **SIZE, **image}


def inpaint_9_channels(batch: int = 2):
    return inpaint(batch, 9)


def instruct_pix2pix(batch: int = 2):
    pipe = diffusers.StableDiffusionXLInstructPix2PixPipeline(**components(unet(8)))
    image = {"image": pixels(batch, 32), "image_guidance_scale": 1.5}
    return pipe, {**embeddings(batch), **SIZE, **image}


def controlnet(batch: int = 2):
    network = seeded(
        diffusers.ControlNetModel,
        **BLOCKS,
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(16, 32),
        projection_class_embeddings_input_dim=80,
    )
    for parameter in network.parameters():
        if not parameter.any():  # convolutions that start at zero would hide mistakes
            nn.init.normal_(parameter, std=0.1)
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**components(), controlnet=network)
    return pipe, {**embeddings(batch), **SIZE, "image": pixels(batch, 32)}


def ip_adapter(batch: int = 2):
    network = unet()
    state = _ip_adapter_weights(network)
    network._load_ip_adapter_weights([state])
    pipe = diffusers.StableDiffusionXLPipeline(**components(network))
    # the unconditional and the conditional image, which all prompts share
    image = normal(2, 1, 32, seed=6)
    return pipe, {**embeddings(batch), **SIZE, "ip_adapter_image_embeds": [image]}


def _ip_adapter_weights(network: nn.Module) -> dict:
    """Random weights in the format of the published IP-Adapters, by diffusers' own reading."""
    attention = {}
    key = 1
    for path in network.attn_processors:
        if path.endswith("attn1.processor"):
            continue
        module = network.get_submodule(path.removesuffix(".processor"))
        width = module.to_k.get_base_layer().out_features
        for side, seed in (("k", 11), ("v", 12)):
            attention[f"{key}.to_{side}_ip.weight"] = 0.2 * normal(width, 64, seed=seed + key)
        key += 2
    projection = {
        "proj.weight": normal(4 * 64, 32, seed=21) / 6,
        "proj.bias": torch.zeros(4 * 64),
        "norm.weight": torch.ones(64),
        "norm.bias": torch.zeros(64),
    }
    return {"image_proj": projection, "ip_adapter": attention}
