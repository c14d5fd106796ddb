# SPDX-License-Identifier: Apache-2.0
"""Align adapters of the shipped model through the gradients of their rewards.

`align` trains the shipped adapters, one reward each; `align_sum` trains one on a weighted sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from msdda_fast.emoji.prompts import alignment_prompts
from msdda_fast.emoji.sampling import GUIDANCE_SCALE, NUM_STEPS
from msdda_fast.objective import Objective
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.rewards import Reward, load_reward
from msdda_fast.steps.ddim import DDIMRule, ddim_grid
from msdda_fast.training import RewardGradientConfig, RewardTask, add_lora, train_reward_gradient
from msdda_fast.training.codec import encode_prompts, latent_shape, soft_decoder

RANK = 4
PROMPTS = alignment_prompts(120)
#: Below, objects and colours are settled: most of an adapter's KL to the base would be spent on
#: details that its reward does not see.
TIMESTEPS = (300.0, 999.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentRecipe:
    """The settings with which one adapter is aligned."""

    config: RewardGradientConfig

    @property
    def eta(self) -> float:
        """Noise of the policy; of the paper: 1.0 for aesthetic, 0.8 for consistency."""
        return self.config.level


def _recipe(eta: float, kl_weight: float, steps: int, seed: int) -> AlignmentRecipe:
    """Return a recipe; each adapter has a seed, so that factors do not start from equal ones."""
    return AlignmentRecipe(
        config=RewardGradientConfig(
            steps=steps, level=eta, kl_weight=kl_weight, seed=seed, lr=2e-3, timesteps=TIMESTEPS,
            guidance_scale=GUIDANCE_SCALE,
        )
    )  # fmt: skip


# An adapter has the name of its reward. Those of `REWARDS` are the model's own objectives, the
# others are there to be asked for. Chosen on the training prompts.
ALIGNMENT = {
    "aesthetic": _recipe(1.0, kl_weight=0.1, steps=60, seed=2),
    "consistency": _recipe(0.8, kl_weight=0.01, steps=300, seed=1),
    "warmth": _recipe(1.0, kl_weight=0.1, steps=40, seed=3),
}


class WeightedSum:
    """The reward r = sum_j weights_j r_j; differentiable if all are."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not weights:
            raise ValueError(f"no rewards to align to; weights: {dict(weights)}")
        self.weights = dict(weights)
        self.rewards: dict[str, Reward] = {name: load_reward(name) for name in weights}
        self.name = " + ".join(f"{weight:g} {name}" for name, weight in weights.items())
        self.differentiable = all(reward.differentiable for reward in self.rewards.values())

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1], one prompt each; return shape (N,)."""
        terms = [self.weights[n] * reward(images, prompts) for n, reward in self.rewards.items()]
        return torch.stack(terms).sum(0)


def align(base: Path, name: str, work: Path) -> Path:
    """Train the shipped adapter `name` on the model folder `base` and return its LoRA folder.

    Resumes from the checkpoints in `work`.
    """
    return _train(base, load_reward(name), ALIGNMENT[name], work / f"align-{name}")


def align_sum(
    base: Path, weights: Mapping[str, float], recipe: AlignmentRecipe, out_dir: Path
) -> Path:
    """Train an adapter for r = sum_j weights_j r_j and return its LoRA folder, `out_dir`.

    Deterministic; resumes from checkpoints.

    Args:
        base: Folder of the base model.
        weights: By name of the reward (see `load_reward`); any finite numbers.
        recipe: Noise level and training configuration.
        out_dir: Receives log, checkpoints and `pytorch_lora_weights.safetensors` (fp16).

    Raises:
        ValueError: There are no weights, or a reward is unknown.
        ResumeMismatch: `out_dir` holds a run with other weights or another recipe.
    """
    return _train(base, WeightedSum(weights), recipe, out_dir)


def _train(base: Path, reward: Reward, recipe: AlignmentRecipe, out_dir: Path) -> Path:
    pipe = MSDDAPipeline.from_pretrained(base, objectives=base_policy(recipe.eta))
    task = RewardTask(
        reward=reward,
        decode=soft_decoder(pipe),
        prompts=PROMPTS,
        conditions={"encoder_hidden_states": encode_prompts(pipe, PROMPTS)},
        latent_shape=latent_shape(pipe),
        null_conditions={"encoder_hidden_states": encode_prompts(pipe, [""])[0]},
    )
    rule = DDIMRule(ddim_grid(pipe.scheduler, NUM_STEPS))
    add_lora(pipe.unet, rank=RANK, seed=recipe.config.seed)
    train_reward_gradient(pipe.unet, rule, task, recipe.config, out_dir, weight_dtype=torch.float16)
    return out_dir


def base_policy(eta: float) -> dict[str, Objective]:
    """Return the base model as the only objective."""
    return {"base": Objective.base(eta=eta)}
