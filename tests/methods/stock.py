# SPDX-License-Identifier: Apache-2.0
"""A tiny Stable Diffusion 3 with text encoders and four adapters."""

import warnings
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model

import msdda_fast as mf
from tests.families import encoders, images
from tests.families.parts import JOINT_ATTENTION

STEPS, PROMPTS, SEEDS = 3, ["a red dog", "a blue cat"], [3, 4]
LEVELS = {"a": 0.7, "b": 0.4}
RUN = {"num_inference_steps": STEPS, "guidance_scale": 2.0}


def stock() -> Any:
    """The stock pipeline; "a" and "b" are of unequal rank, "c" and "d" of one, on equal layers."""
    pipe, _ = images.sd3()
    tokenizer = encoders.Tokenizer()
    for suffix in ("", "_2"):
        network = encoders.clip(projected=True)
        pipe.register_modules(**{f"text_encoder{suffix}": network, f"tokenizer{suffix}": tokenizer})
    pipe.tokenizer_max_length = tokenizer.model_max_length
    pipe.default_sample_size = 8
    pipe.set_progress_bar_config(disable=True)
    config = LoraConfig(r=4, target_modules=list(JOINT_ATTENTION), init_lora_weights=False)
    torch.manual_seed(7)
    for name in "cd":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            inject_adapter_in_model(config, pipe.transformer, name)
    pipe.transformer.eval()
    return pipe


def objectives(kind=mf.FlowSDE, names="ab", **more) -> dict[str, mf.Objective]:
    """Objectives with noise of their own."""
    levels = dict(zip(names, LEVELS.values(), strict=True))
    return {name: mf.Objective(name, noise=kind(a), **more) for name, a in levels.items()}


def attached(pipe=None, **own) -> Any:
    return mf.MSDDAPipeline.from_pipe(pipe or stock(), objectives=own or objectives())


def drawn(pipe, weights, **more):
    """(B, 3, H, W) of a call of the pipeline."""
    return pipe(PROMPTS, weights=weights, seed=SEEDS, output_type="pt", **RUN, **more).images
