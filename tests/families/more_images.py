# SPDX-License-Identifier: Apache-2.0
"""More tiny image transformers: (pipeline, arguments of its call for `batch` prompts)."""

import diffusers
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from torch import nn

from tests.families.images import flux_vae, qwen
from tests.families.parts import (
    ATTENTION,
    FEED_FORWARD,
    JOINT_ATTENTION,
    adapt,
    flow_scheduler,
    image_vae,
    normal,
    seeded,
)

TEXTLESS = {"text_encoder": None, "tokenizer": None}
SIZE = {"height": 16, "width": 16}


def _texts(batch: int, width: int, *, masks: bool = True) -> dict:
    call = {
        "prompt_embeds": normal(batch, 7, width, seed=1),
        "negative_prompt_embeds": normal(batch, 7, width, seed=2),
    }
    if masks:
        mask = torch.ones(batch, 7, dtype=torch.bool)
        mask[0, 5:] = False
        call["prompt_attention_mask"] = mask
        call["negative_prompt_attention_mask"] = torch.ones(batch, 7, dtype=torch.bool)
    return call


def _awake(network: nn.Module) -> nn.Module:
    """Parameters that begin at zero would hide mistakes."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def qwen_edit(batch: int = 2):
    """Qwen-Image with an image to change, whose tokens follow those of the latents."""
    # it scales any image to a million pixels, whatever height and width say
    pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (32, 32, None)
    stock, call = qwen(batch)
    pipe = diffusers.QwenImageEditPipeline(**stock.components, processor=None)
    red = Image.new("RGB", (32, 32), "red")
    return pipe, {**call, "image": red}


def chroma(batch: int = 2):
    transformer = seeded(
        diffusers.ChromaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    adapt(transformer, *JOINT_ATTENTION, *FEED_FORWARD, "proj_mlp", "x_embedder", "linear_1")
    pipe = diffusers.ChromaPipeline(
        transformer=transformer, vae=flux_vae(), scheduler=flow_scheduler(), **TEXTLESS
    )
    return pipe, {**_texts(batch, 32), "guidance_scale": 4.0, "height": 8, "width": 8}


def lumina2(batch: int = 2):
    transformer = seeded(
        diffusers.Lumina2Transformer2DModel,
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    adapt(transformer, *ATTENTION, "linear_1", "linear_2", "linear_3")
    pipe = diffusers.Lumina2Pipeline(
        transformer=transformer, vae=image_vae(), scheduler=flow_scheduler(), **TEXTLESS
    )
    return pipe, {**_texts(batch, 8), "guidance_scale": 4.0, "height": 32, "width": 32}


def sana(batch: int = 2):
    transformer = seeded(
        diffusers.SanaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    adapt(transformer, *ATTENTION, "conv_inverted", "conv_point", "linear_1", "linear_2")
    vae = seeded(
        diffusers.AutoencoderDC,
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    pipe = diffusers.SanaPipeline(
        transformer=_awake(transformer), vae=vae, scheduler=flow_scheduler(shift=7.0), **TEXTLESS
    )
    plain = {"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None}
    return pipe, {**_texts(batch, 8), **plain, "height": 32, "width": 32}


def aura_flow(batch: int = 2):
    transformer = seeded(
        diffusers.AuraFlowTransformer2DModel,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    adapt(transformer, *JOINT_ATTENTION, "linear_1", "linear_2", "out_projection")
    pipe = diffusers.AuraFlowPipeline(
        transformer=_awake(transformer),
        vae=image_vae(),
        scheduler=flow_scheduler(shift=1.73),
        **TEXTLESS,
    )
    return pipe, {**_texts(batch, 32), "guidance_scale": 3.5, "height": 32, "width": 32}


def cogview4(batch: int = 2):
    transformer = seeded(
        diffusers.CogView4Transformer2DModel,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    adapt(transformer, *ATTENTION, *FEED_FORWARD, "linear_1", "linear_2", "norm1.linear")
    pipe = diffusers.CogView4Pipeline(
        transformer=transformer,
        vae=image_vae(),
        scheduler=flow_scheduler(
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
        **TEXTLESS,
    )
    return pipe, {**_texts(batch, 32, masks=False), **SIZE, "guidance_scale": 4.0}


def pixart_sigma(batch: int = 2):
    transformer = seeded(
        diffusers.PixArtTransformer2DModel,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    adapt(transformer, *ATTENTION, *FEED_FORWARD, "linear_1", "linear_2")
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=_awake(transformer),
        vae=image_vae(),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
        **TEXTLESS,
    )
    plain = {"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None}
    return pipe, {**_texts(batch, 32), **plain, **SIZE, "guidance_scale": 4.5}
