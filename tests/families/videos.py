# SPDX-License-Identifier: Apache-2.0
"""Tiny video transformers: (pipeline, arguments of its call for `batch` prompts)."""

import diffusers
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from torch import nn

from tests.families.parts import (
    ATTENTION,
    FEED_FORWARD,
    adapt,
    flow_scheduler,
    normal,
    pixels,
    seeded,
    wan_vae,
)

TEXTLESS = {"text_encoder": None, "tokenizer": None}


def wan_transformer() -> nn.Module:
    network = seeded(
        diffusers.WanTransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    others = ("ffn.net.0.proj", "ffn.net.2", "time_proj", "linear_1", "linear_2")
    return adapt(network, *ATTENTION, *others)


def wan(batch: int = 2, **settings):
    second = None
    if "boundary_ratio" in settings:  # Wan 2.2: one transformer for each range of noise
        second = wan_transformer()
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.mul_(0.9)
    pipe = diffusers.WanPipeline(
        transformer=wan_transformer(),
        transformer_2=second,
        vae=wan_vae(),
        scheduler=flow_scheduler(),
        **TEXTLESS,
        **settings,
    )
    return pipe, {
        "prompt_embeds": normal(batch, 7, 32, seed=1),
        "negative_prompt_embeds": normal(batch, 7, 32, seed=2),
        "guidance_scale": 5.0,
        "height": 16,
        "width": 16,
        "num_frames": 5,
    }


def wan_two_transformers(batch: int = 2):
    return wan(batch, boundary_ratio=0.875)


def wan_timesteps_per_token(batch: int = 2):
    return wan(batch, expand_timesteps=True)


def wan_multistep(batch: int = 2):
    """With the solver that Wan ships with: second order, with a history."""
    pipe, call = wan(batch)
    pipe.scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return pipe, call


def _ltx_parts() -> dict:
    transformer = seeded(
        diffusers.LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    adapt(transformer, *ATTENTION, *FEED_FORWARD, "proj_in", "linear_1", "linear_2")
    vae = seeded(
        diffusers.AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    scheduler = flow_scheduler(use_dynamic_shifting=True)
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler, **TEXTLESS}


def _ltx_call(batch: int) -> dict:
    return {
        "prompt_embeds": normal(batch, 7, 32, seed=1),
        "negative_prompt_embeds": normal(batch, 7, 32, seed=2),
        "prompt_attention_mask": torch.ones(batch, 7),
        "negative_prompt_attention_mask": torch.ones(batch, 7),
        "guidance_scale": 3.0,
        "guidance_rescale": 0.5,
        "height": 32,
        "width": 32,
        "num_frames": 9,
    }


def ltx(batch: int = 2):
    return diffusers.LTXPipeline(**_ltx_parts()), _ltx_call(batch)


def ltx_image_to_video(batch: int = 1):
    pipe = diffusers.LTXImageToVideoPipeline(**_ltx_parts())
    return pipe, {**_ltx_call(batch), "image": pixels(batch, 32)}


def _connectors() -> nn.Module:
    return seeded(
        LTX2TextConnectors,
        caption_channels=32,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )


def _ltx2_autoencoders() -> dict:
    video = seeded(
        diffusers.AutoencoderKLLTX2Video,
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    audio = seeded(
        diffusers.AutoencoderKLLTX2Audio,
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        dropout=0.0,
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    )
    vocoder = seeded(
        LTX2Vocoder,
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        leaky_relu_negative_slope=0.1,
        output_sampling_rate=16000,
    )
    return {"vae": video, "audio_vae": audio, "vocoder": vocoder}


def ltx2(batch: int = 2):
    """Video and sound, each with a scheduler of its own."""
    transformer = seeded(
        diffusers.LTX2VideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        caption_channels=32,
        rope_double_precision=False,
        rope_type="split",
    )
    adapt(transformer, *ATTENTION, *FEED_FORWARD, "proj_in", "linear_1", "linear_2")
    pipe = diffusers.LTX2Pipeline(
        transformer=transformer,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        connectors=_connectors(),
        **_ltx2_autoencoders(),
        **TEXTLESS,
    )
    mask = torch.ones(batch, 32, dtype=torch.long)
    return pipe, {
        "prompt_embeds": normal(batch, 32, 96, seed=1),
        "negative_prompt_embeds": normal(batch, 32, 96, seed=2),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0,
        "guidance_rescale": 0.5,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_guidance_scale": 2.0,
        "audio_guidance_rescale": 0.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        "spatio_temporal_guidance_blocks": None,
        "use_cross_timestep": False,
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "frame_rate": 25.0,
    }


def hunyuan_video(batch: int = 2):
    transformer = seeded(
        diffusers.HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    others = ("proj_mlp", "norm.linear", "norm1.linear", "linear_1", "linear_2")
    adapt(transformer, *ATTENTION, *FEED_FORWARD, *others)
    vae = seeded(
        diffusers.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = diffusers.HunyuanVideoPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=flow_scheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
        **TEXTLESS,
    )
    mask = torch.ones(batch, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return pipe, {
        "prompt_embeds": normal(batch, 7, 16, seed=1),
        "pooled_prompt_embeds": normal(batch, 8, seed=3),
        "prompt_attention_mask": mask,
        "guidance_scale": 4.5,
        "height": 16,
        "width": 16,
        "num_frames": 5,
    }
