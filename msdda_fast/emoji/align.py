# SPDX-License-Identifier: Apache-2.0
"""Align adapters of the shipped model by step-level DPO on samples of the base model.

`align` trains the shipped adapters, one reward each; `align_sum` trains one on a weighted sum.
Samples are shared: one collection per eta, scored afterwards by any reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdda_fast.emoji.prompts import alignment_prompts
from msdda_fast.emoji.sampling import DTYPE, sampler, score
from msdda_fast.objective import Objective
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.rewards import REWARDS, load_reward
from msdda_fast.training import (
    Collection,
    StepDPOConfig,
    add_lora,
    collect,
    preference_pairs,
    train_step_dpo,
)

RANK = 4
PROMPTS = alignment_prompts(120)
SEEDS = range(10_000, 10_012)  # per prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentRecipe:
    """The settings with which one adapter is aligned."""

    eta: float  # of the sampled base model; of the paper: 1.0 for aesthetic, 0.8 for consistency
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
# An adapter has the name of its reward. Those of `REWARDS` are the model's own objectives, the
# others are there to be asked for.
ALIGNMENT = {
    "aesthetic": AlignmentRecipe(eta=1.0, config=StepDPOConfig(steps=100, lr=3e-4, **_COMMON)),
    "consistency": AlignmentRecipe(eta=0.8, config=StepDPOConfig(steps=300, lr=5e-4, **_COMMON)),
    "warmth": AlignmentRecipe(
        eta=1.0, config=StepDPOConfig(steps=30, lr=3e-4, **_COMMON | {"beta_dpo": 6000.0})
    ),
}


def align(base: Path, name: str, work: Path) -> Path:
    """Train the shipped adapter `name` on the model folder `base` and return its LoRA folder.

    Resumes from the shards of samples and the checkpoints in `work`.
    """
    recipe = ALIGNMENT[name]
    return align_sum(base, {name: 1.0}, recipe, work, work / f"align-{name}" / "train")


def align_sum(
    base: Path, weights: Mapping[str, float], recipe: AlignmentRecipe, work: Path, out_dir: Path
) -> Path:
    """Train an adapter for r = sum_j weights_j r_j and return its LoRA folder, `out_dir`.

    Samples the base model at the recipe's eta, ranks the samples of each prompt by r, and trains
    on the best third against the worst. Deterministic; resumes from shards and checkpoints.

    Args:
        base: Folder of the base model.
        weights: By name of the reward (see `load_reward`); any finite numbers.
        recipe: The eta of the samples and the training configuration.
        work: Folder of the samples, which all adapters of one eta share.
        out_dir: Receives log, checkpoints and `pytorch_lora_weights.safetensors` (fp16).

    Raises:
        ValueError: There are no weights, or a reward is unknown.
        ResumeMismatch: `out_dir` holds a run with other weights or another recipe.
    """
    if not weights:
        raise ValueError(f"no rewards to align to; weights: {dict(weights)}")
    pipe = MSDDAPipeline.from_pretrained(base, objectives=base_policy(recipe.eta))
    samples = base_samples(base, recipe.eta, work)
    terms = [weight * score(pipe, samples, PROMPTS, name) for name, weight in weights.items()]
    total = torch.stack(terms).sum(0)
    pairs = preference_pairs(
        samples.latents, total, samples.prompt_index, generator=torch.Generator().manual_seed(0)
    )
    add_lora(pipe.unet, rank=RANK)
    embeds = prompt_embeds(pipe, PROMPTS)
    train_step_dpo(
        pipe.unet,
        pipe.scheduler,
        pairs,
        embeds,
        recipe.config,
        out_dir,
        weight_dtype=torch.float16,
    )
    return out_dir


def base_policy(eta: float) -> dict[str, Objective]:
    """Return the base model as the only objective."""
    return {"base": Objective.base(eta=eta)}


def base_samples(base: Path, eta: float, work: Path) -> Collection:
    """Sample the base model on `PROMPTS` x `SEEDS` and score it by `REWARDS`; resumes."""
    pipe = MSDDAPipeline.from_pretrained(base, objectives=base_policy(eta), dtype=DTYPE)
    return collect(
        sampler(pipe, {"base": 1.0}),
        {reward: load_reward(reward) for reward in REWARDS},
        PROMPTS,
        SEEDS,
        work / f"samples-eta-{eta:g}",
        batch_size=50,
    )


@torch.no_grad()
def prompt_embeds(pipe: MSDDAPipeline, prompts: tuple[str, ...]) -> Tensor:
    """Encode prompts with the pipeline's own text encoder; shape (P, L, D)."""
    embeds: Tensor = pipe.encode_prompt(list(prompts), "cpu", 1, False)[0]
    return embeds
