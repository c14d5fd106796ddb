# SPDX-License-Identifier: Apache-2.0
"""Objectives for a pipeline of any family: here Stable Diffusion 3, tiny and with random weights.

A real one comes from `from_pretrained`, and its adapters from `load_lora_weights`.
"""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig

import msdda_fast as mf

torch.manual_seed(0)
transformer = SD3Transformer2DModel(
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
)
for name in ("text", "taste"):
    transformer.add_adapter(
        LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False), name
    )
stock = StableDiffusion3Pipeline(
    transformer=transformer,
    scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    vae=AutoencoderKL(latent_channels=4, block_out_channels=(32,), shift_factor=0.0),
    text_encoder=None,
    tokenizer=None,
    text_encoder_2=None,
    tokenizer_2=None,
    text_encoder_3=None,
    tokenizer_3=None,
)

pipe = mf.MSDDAPipeline.from_pipe(
    stock,
    objectives={
        "text": mf.Objective("text", noise=mf.FlowSDE(0.7)),
        "both": mf.Objective(["text", "taste"], scale=[0.5, 1.0], noise=mf.FlowSDE(0.4)),
        "base": mf.Objective.base(),
    },
)
assert isinstance(pipe, StableDiffusion3Pipeline)  # all that it can do, it still can
images = pipe(
    prompt_embeds=torch.randn(2, 7, 32),  # two prompts; a real pipeline takes texts
    negative_prompt_embeds=torch.randn(2, 7, 32),
    pooled_prompt_embeds=torch.randn(2, 64),
    negative_pooled_prompt_embeds=torch.randn(2, 64),
    height=8,
    width=8,
    num_inference_steps=8,
    weights=[{"text": 0.3, "both": 0.5, "base": 0.2}, {"text": 0.0, "both": 1.0, "base": 0.0}],
    levels={"base": mf.FlowSDE(0.7)},  # it was trained without noise, so the call says which
    seed=[7, 8],
).images
print(f"{type(pipe).__name__}: {len(images)} images of {images[0].size}")
