# SPDX-License-Identifier: Apache-2.0
"""The first half of a DPOK loop: draw trajectories, score their images, keep the transitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape
from msdda_fast.rewards import Reward
from msdda_fast.training.dpok_config import DPOKConfig
from msdda_fast.training.policy import DDIMPolicy, Transitions

DecodeFn = Callable[[Tensor], Tensor]
"""Clean latents x_0 (b, *S) in latent units -> images (b, 3, height, width) in [0, 1]."""


def roll_out(
    policy: DDIMPolicy,
    reward: Reward,
    decode: DecodeFn,
    prompts: Sequence[str],
    latent_shape: Sequence[int],
    config: DPOKConfig,
    generator: torch.Generator,
) -> tuple[Transitions, Tensor]:
    """Draw `prompts_per_loop` x `samples_per_prompt` trajectories and score them.

    Returns: the transitions to learn from, trajectory by trajectory and on the CPU, and the
        rewards, (prompts, samples) float32.

    Raises:
        InvalidShape: The reward returned the wrong number of rows.
        ValueError: A reward is not finite; the message names the prompt.
    """
    drawn = torch.randperm(len(prompts), generator=generator)[: config.prompts_per_loop]
    rows = drawn.repeat_interleave(config.samples_per_prompt)
    scores, parts = [], []
    for batch in torch.split(rows, config.rollout_batch_size):
        x_0, taken = policy.rollout(batch, latent_shape, generator)
        with torch.no_grad():
            score = checked_score(reward, decode(x_0), [prompts[index] for index in batch]).cpu()
        scores.append(score)
        parts.append([replace(step, reward=score) for step in taken[: config.trained_steps]])
    rewards = torch.cat(scores).reshape(-1, config.samples_per_prompt)
    advantages = torch.split(relative_to_prompt(rewards).flatten(), config.rollout_batch_size)
    trajectories = [
        Transitions.by_trajectory([replace(step, advantage=advantage) for step in taken])
        for taken, advantage in zip(parts, advantages, strict=True)
    ]
    return Transitions.cat(trajectories), rewards


def relative_to_prompt(rewards: Tensor) -> Tensor:
    """Return rewards minus their row's mean, over the root mean square of all those differences.

    Both are (prompts, samples). All rows share one scale: a prompt whose samples are all alike has
    little to teach, and dividing by its own deviation would amplify noise.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / centred.square().mean().sqrt().clamp_min(1e-6)


def checked_score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the reward of images (b, 3, height, width) in [0, 1], (b,) float32; gradients flow.

    Raises:
        InvalidShape: The reward returned the wrong number of rows.
        ValueError: A reward is not finite; the message names the prompt.
    """
    score = reward(images, prompts)
    if tuple(score.shape) != (len(prompts),):
        raise InvalidShape(f"the reward must return shape ({len(prompts)},), got {score.shape}")
    if not score.isfinite().all():
        worst = prompts[int((~score.isfinite()).nonzero()[0])]
        raise ValueError(f"the reward is not finite for the prompt {worst!r}")
    return score.float()
