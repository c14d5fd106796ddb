# SPDX-License-Identifier: Apache-2.0
"""Align the two adapters of the shipped model by step-level DPO on their own samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdda_fast.embedded.prompts import alignment_prompts
from msdda_fast.embedded.sampling import DTYPE, sampler
from msdda_fast.objective import Objective
from msdda_fast.pipeline.stable_diffusion import MSDDAPipeline
from msdda_fast.rewards import REWARDS, load_reward
from msdda_fast.training import (
    StepDPOConfig,
    add_lora,
    collect,
    preference_pairs,
    train_step_dpo,
)

RANK = 4
PROMPTS = alignment_prompts(120)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentRecipe:
    """How one adapter is aligned: the reward has the adapter's name."""

    eta: float  # of the paper: 1.0 for aesthetic, 0.8 for consistency
    seeds: range  # per prompt
    config: StepDPOConfig


# Timesteps from 500 up: objects and colours are settled there, and below it the preference between
# two images drowns in the prediction error of details. The numbers were chosen on the reward.
_COMMON: dict[str, Any] = {
    "beta_dpo": 2000.0,
    "min_timestep": 500,
    "batch_size": 24,
    "ema_decay": 0.95,
    "bf16": True,
    "checkpoint_every": 50,
}
ALIGNMENT = {
    "aesthetic": AlignmentRecipe(
        eta=1.0, seeds=range(10_000, 10_012), config=StepDPOConfig(steps=100, lr=3e-4, **_COMMON)
    ),
    "consistency": AlignmentRecipe(
        eta=0.8, seeds=range(10_000, 10_012), config=StepDPOConfig(steps=300, lr=5e-4, **_COMMON)
    ),
}


def align(base: Path, name: str, work: Path) -> Path:
    """Train the adapter `name` on the model folder `base` and return its LoRA folder.

    Samples the base model at the recipe's eta, ranks the samples of each prompt by the reward that
    bears the adapter's name, and trains on the best third against the worst. Finished shards and
    checkpoints in `work` are not done again.
    """
    recipe, folder = ALIGNMENT[name], work / f"align-{name}"
    policy = {name: Objective.base(eta=recipe.eta)}
    pipe = MSDDAPipeline.from_pretrained(base, objectives=policy, dtype=DTYPE)
    samples = collect(
        sampler(pipe, {name: 1.0}),
        {reward: load_reward(reward) for reward in REWARDS},
        PROMPTS,
        recipe.seeds,
        folder / "samples",
        batch_size=50,
    )
    generator = torch.Generator().manual_seed(0)
    pairs = preference_pairs(
        samples.latents, samples.scores[name], samples.prompt_index, generator=generator
    )
    pipe = MSDDAPipeline.from_pretrained(base, objectives=policy)
    add_lora(pipe.unet, rank=RANK)
    embeds = prompt_embeds(pipe, PROMPTS)
    train_step_dpo(
        pipe.unet,
        pipe.scheduler,
        pairs,
        embeds,
        recipe.config,
        folder / "train",
        weight_dtype=torch.float16,
    )
    return folder / "train"


@torch.no_grad()
def prompt_embeds(pipe: MSDDAPipeline, prompts: tuple[str, ...]) -> Tensor:
    """Encode prompts with the pipeline's own text encoder; shape (P, L, D)."""
    embeds: Tensor = pipe.encode_prompt(list(prompts), "cpu", 1, False)[0]
    return embeds
