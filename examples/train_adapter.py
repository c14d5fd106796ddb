# SPDX-License-Identifier: Apache-2.0
"""Train an adapter on a reward of one's own by step-level DPO, then use it: writes dark.png.

The settings are for a look at the mechanism, in seconds. For an adapter that is worth keeping take
dozens of prompts, SEEDS = range(12), STEPS = 25 and 200 optimiser steps.
"""

from pathlib import Path

import msdda_fast as mf
from msdda_fast.training import (
    StepDPOConfig,
    add_lora,
    collect,
    preference_pairs,
    train_step_dpo,
)
from msdda_fast.training.codec import encode_prompts, sample_fn

EMOJI, PROMPTS, SEEDS, STEPS = "msdda-fast/emoji", ["A blue car.", "A red hat."], range(3), 4


class Dark:
    """A reward: dark images score high."""

    name = "dark"
    differentiable = True

    def __call__(self, images, prompts):
        return -images.mean((1, 2, 3))


base = mf.MSDDAPipeline.from_pretrained(EMOJI, objectives={"base": mf.Objective.base()})
draw = sample_fn(base, num_steps=STEPS, guidance_scale=1.0)
samples = collect(draw, {"dark": Dark()}, PROMPTS, SEEDS, "dark/samples", progress=False)
pairs = preference_pairs(samples.latents, samples.scores["dark"], samples.prompt_index)

embeds = encode_prompts(base, PROMPTS)
add_lora(base.unet, rank=4, seed=0)
config = StepDPOConfig(steps=2, lr=3e-4, batch_size=4, beta_dpo=2000.0)
train_step_dpo(base.unet, base.scheduler, pairs, embeds, config, "dark", progress=False)

pipe = mf.MSDDAPipeline.from_pretrained(
    EMOJI,
    objectives={
        "dark": mf.Objective(Path("dark"), eta=1.0),
        "consistency": mf.Objective(EMOJI, subfolder="consistency", eta=0.8),
    },
)
weights = {"dark": 0.5, "consistency": 0.5}
image = pipe("A blue car.", weights=weights, num_inference_steps=STEPS, seed=0).images[0]
image.save("dark.png")
