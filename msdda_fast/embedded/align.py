# SPDX-License-Identifier: Apache-2.0
"""Align the two adapters of the shipped model by step-level DPO on their own samples."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from msdda_fast.embedded.prompts import TRAIN_PROMPTS
from msdda_fast.embedded.sampling import DTYPE, sampler
from msdda_fast.objective import Objective
from msdda_fast.pipeline.stable_diffusion import MSDDAPipeline
from msdda_fast.rewards import REWARDS, load_reward
from msdda_fast.training import (
    StepDPOConfig,
    add_lora,
    collect,
    load_lora,
    preference_pairs,
    train_step_dpo,
)

RANK = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round: sample the current policy, rank per prompt, train on."""

    seeds: range  # per train prompt
    config: StepDPOConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentRecipe:
    """How one adapter is aligned: the reward has the adapter's name."""

    eta: float  # of the paper: 1.0 for aesthetic, 0.8 for consistency
    rounds: tuple[Round, ...]


ALIGNMENT = {
    "aesthetic": AlignmentRecipe(
        eta=1.0,
        rounds=(
            Round(
                seeds=range(10_000, 10_032),
                config=StepDPOConfig(steps=200, lr=3e-4, beta_dpo=300, bf16=True),
            ),
        ),
    ),
    "consistency": AlignmentRecipe(
        eta=0.8,
        rounds=(
            Round(
                seeds=range(10_000, 10_032),
                config=StepDPOConfig(steps=300, lr=5e-4, beta_dpo=300, bf16=True),
            ),
            Round(
                seeds=range(20_000, 20_032),
                config=StepDPOConfig(steps=300, lr=5e-4, beta_dpo=300, bf16=True),
            ),
        ),
    ),
}


def align(base: Path, name: str, work: Path) -> Path:
    """Train the adapter `name` on the model folder `base` and return its LoRA folder.

    Every step of it resumes: finished shards, checkpoints and rounds in `work` are not done again.
    """
    recipe = ALIGNMENT[name]
    adapter: Path | None = None
    for number, part in enumerate(recipe.rounds):
        folder = work / f"align-{name}-{number}"
        policy = Objective.base(eta=recipe.eta)
        if adapter is not None:
            policy = Objective(str(adapter), eta=recipe.eta)
        pipe = MSDDAPipeline.from_pretrained(base, objectives={name: policy}, dtype=DTYPE)
        samples = collect(
            sampler(pipe, {name: 1.0}),
            {reward: load_reward(reward) for reward in REWARDS},
            TRAIN_PROMPTS,
            part.seeds,
            folder / "samples",
            batch_size=50,
        )
        generator = torch.Generator().manual_seed(number)
        pairs = preference_pairs(
            samples.latents, samples.scores[name], samples.prompt_index, generator=generator
        )
        pipe = MSDDAPipeline.from_pretrained(base, objectives={"base": Objective.base()})
        add_lora(pipe.unet, rank=RANK)
        if adapter is not None:
            load_lora(pipe.unet, adapter)
        train_step_dpo(
            pipe.unet, pipe.scheduler, pairs, prompt_embeds(pipe, TRAIN_PROMPTS), part.config,
            folder / "train", weight_dtype=torch.float16,
        )  # fmt: skip
        adapter = folder / "train"
    if adapter is None:
        raise ValueError(f"the recipe of {name!r} has no rounds")
    finished = work / name
    finished.mkdir(exist_ok=True)
    shutil.copy2(adapter / "pytorch_lora_weights.safetensors", finished)
    return finished


@torch.no_grad()
def prompt_embeds(pipe: MSDDAPipeline, prompts: tuple[str, ...]) -> Tensor:
    """Encode prompts with the pipeline's own text encoder; shape (P, L, D)."""
    embeds: Tensor = pipe.encode_prompt(list(prompts), "cpu", 1, False)[0]
    return embeds
