# SPDX-License-Identifier: Apache-2.0
"""Tiny image transformers: (pipeline, arguments of its call for `batch` prompts)."""

import inspect

import diffusers
import torch
from torch import nn

from tests.families.parts import (
    ATTENTION,
    FEED_FORWARD,
    JOINT_ATTENTION,
    adapt,
    flow_scheduler,
    image_vae,
    normal,
    pixels,
    seeded,
)


def _as(kind, pipe, **more):
    """The same components in another pipeline."""
    names = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in names}
    return kind(**parts, **more)


def sd3(batch: int = 2):
    transformer = adapt(
        seeded(
            diffusers.SD3Transformer2DModel,
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=64,
            dual_attention_layers=(0,),
        ),
        *JOINT_ATTENTION,
        *FEED_FORWARD,
        *("norm1.linear", "context_embedder", "linear_1", "linear_2"),
    )
    absent = ("text_encoder", "tokenizer")
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow_scheduler(),
        vae=image_vae(),
        **{f"{name}{suffix}": None for name in absent for suffix in ("", "_2", "_3")},
    )
    return pipe, {
        "prompt_embeds": normal(batch, 7, 32, seed=1),
        "negative_prompt_embeds": normal(batch, 7, 32, seed=2),
        "pooled_prompt_embeds": normal(batch, 64, seed=3),
        "negative_pooled_prompt_embeds": normal(batch, 64, seed=4),
        "guidance_scale": 5.0,
        "height": 16,
        "width": 16,
    }


def sd3_skip_layers(batch: int = 2):
    pipe, call = sd3(batch)
    skip = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    return pipe, {**call, **skip, "skip_guidance_layers": [1]}


def flux_vae() -> nn.Module:
    return seeded(
        diffusers.AutoencoderKL,
        sample_size=32,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )


FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}


def flux(batch: int = 2):
    transformer = adapt(
        seeded(diffusers.FluxTransformer2DModel, **FLUX, guidance_embeds=True),
        *JOINT_ATTENTION,
        *FEED_FORWARD,
        *("proj_mlp", "proj_out", "norm.linear", "norm1.linear"),
        *("x_embedder", "context_embedder", "linear_1", "linear_2"),
    )
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=flux_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    return pipe, {
        "prompt_embeds": normal(batch, 7, 32, seed=1),
        "pooled_prompt_embeds": normal(batch, 32, seed=3),
        "guidance_scale": 3.5,
        "height": 8,
        "width": 8,
    }


def flux_as_many_tokens_as_rows(batch: int = 4):
    pipe, call = flux(batch)
    few = {"prompt_embeds": normal(batch, batch, 32, seed=1), "height": 4, "width": 4}
    return pipe, {**call, **few}


def flux_true_guidance(batch: int = 2):
    pipe, call = flux(batch)
    negative = {
        "negative_prompt_embeds": normal(batch, 7, 32, seed=2),
        "negative_pooled_prompt_embeds": normal(batch, 32, seed=4),
    }
    return pipe, {**call, **negative, "true_cfg_scale": 4.0}


def flux_img2img(batch: int = 2):
    pipe, call = flux(batch)
    image = {"image": pixels(batch, 8), "strength": 0.8}
    return _as(diffusers.FluxImg2ImgPipeline, pipe), {**call, **image}


def flux_kontext(batch: int = 1):
    pipe, call = flux(batch)
    image = {"image": pixels(1, 8), "max_area": 64, "_auto_resize": False}
    return _as(diffusers.FluxKontextPipeline, pipe), {**call, **image}


def flux_controlnet(batch: int = 2):
    network = seeded(diffusers.FluxControlNetModel, **FLUX, guidance_embeds=True)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    pipe, call = flux(batch)
    controlled = _as(diffusers.FluxControlNetPipeline, pipe, controlnet=network)
    return controlled, {**call, "control_image": pixels(batch, 8)}


def flux2(batch: int = 2):
    transformer = adapt(
        seeded(
            diffusers.Flux2Transformer2DModel,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            timestep_guidance_channels=256,
            axes_dims_rope=[4, 4, 4, 4],
        ),
        *JOINT_ATTENTION,
        *(
            "ff.linear_in",
            "ff.linear_out",
            "to_qkv_mlp_proj",
            "single_transformer_blocks.0.attn.to_out",
        ),
        *("x_embedder", "context_embedder", "linear_1", "linear_2"),
    )
    vae = seeded(
        diffusers.AutoencoderKLFlux2,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = diffusers.Flux2Pipeline(
        transformer=transformer,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )
    call = {"prompt_embeds": normal(batch, 7, 16, seed=1), "guidance_scale": 4.0}
    return pipe, {**call, "height": 8, "width": 8}


def qwen_transformer() -> nn.Module:
    network = seeded(
        diffusers.QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    mlps = tuple(f"{stream}_mlp.net.{part}" for stream in ("img", "txt") for part in ("0.proj", 2))
    others = ("img_mod.1", "txt_mod.1", "img_in", "txt_in", "linear_1", "linear_2")
    return adapt(network, *JOINT_ATTENTION, *mlps, *others)


def qwen(batch: int = 2):
    vae = seeded(
        diffusers.AutoencoderKLQwenImage,
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = diffusers.QwenImagePipeline(
        transformer=qwen_transformer(),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )
    mask = torch.ones(batch, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return pipe, {
        "prompt_embeds": normal(batch, 7, 16, seed=1),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": normal(batch, 6, 16, seed=2),
        "negative_prompt_embeds_mask": torch.ones(batch, 6, dtype=torch.long),
        "true_cfg_scale": 4.0,
        "height": 32,
        "width": 32,
    }


def z_image(batch: int = 2):
    transformer = seeded(
        diffusers.ZImageTransformer2DModel,
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    others = ("w1", "w2", "w3", "cap_embedder.1", "all_x_embedder.2-1", "t_embedder.mlp.0")
    adapt(transformer, *ATTENTION, *others)
    vae = seeded(
        diffusers.AutoencoderKL,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[32, 64],
        latent_channels=16,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    pipe = diffusers.ZImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=flow_scheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    return pipe, {
        "prompt_embeds": [normal(5 + i, 16, seed=1 + i) for i in range(batch)],
        "negative_prompt_embeds": [normal(4, 16, seed=5 + i) for i in range(batch)],
        "guidance_scale": 3.0,
        "cfg_normalization": False,
        "height": 32,
        "width": 32,
    }
