# SPDX-License-Identifier: Apache-2.0
"""The whole alignment, twice round, on a base model known in closed form: the reward rises."""

import pytest
import torch
from torch import nn

from msdda_fast.training import (
    StepDPOConfig,
    add_lora,
    collect,
    load_lora,
    preference_pairs,
    train_step_dpo,
)

from .conftest import SHAPE, WIDTH, make_embeds, make_scheduler

PROMPTS = ["bright", "brighter", "brightest"]
ALPHA_BAR = make_scheduler().alphas_cumprod


class GaussianPolicy(nn.Module):
    """eps(x_t) = sqrt(1 - abar) x_t, exact for data N(0, 1), plus a shift that a LoRA can learn."""

    def __init__(self):
        super().__init__()
        self.to_v = nn.Linear(WIDTH, SHAPE[0], bias=False)
        nn.init.zeros_(self.to_v.weight)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict):
        scale = (1 - ALPHA_BAR[timestep]).sqrt().reshape(-1, 1, 1, 1)
        shift = self.to_v(encoder_hidden_states.mean(1))[:, :, None, None]
        return (scale * sample + shift,)

    @torch.no_grad()
    def sample(self, prompts, seeds):
        """DDIM at eta = 1 in ten steps; the image is a squashed part of the latent."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        embeds = make_embeds()[[PROMPTS.index(prompt) for prompt in prompts]]

        def noise():
            return torch.stack([torch.randn(SHAPE, generator=g) for g in generators])

        x = noise()
        for t in range(900, -1, -100):
            a, b = ALPHA_BAR[t], ALPHA_BAR[t - 100] if t else torch.tensor(1.0)
            (eps,) = self(x, torch.full((len(x),), t), embeds, return_dict=False)
            x_0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
            var = (1 - b) / (1 - a) * (1 - a / b)
            x = b.sqrt() * x_0 + (1 - b - var).clamp_min(0).sqrt() * eps + var.sqrt() * noise()
        return x, x[:, :3].sigmoid()


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("gamma", [1.0, 0.0], ids=["paper", "diffusion-dpo"])
def test_collect_rank_train_raises_the_reward_and_again_on_own_samples(tmp_path, gamma):
    means, errors = [], []
    for turn in range(3):
        policy = GaussianPolicy()
        add_lora(policy)
        if turn:
            load_lora(policy, tmp_path / f"lora-{turn - 1}")
        samples = collect(
            policy.sample, {"brightness": brightness}, PROMPTS, range(40),
            tmp_path / f"samples-{turn}", batch_size=60, progress=False,
        )  # fmt: skip
        scores = samples.scores["brightness"]
        means.append(scores.mean())
        errors.append(scores.std() / len(scores) ** 0.5)
        pairs = preference_pairs(samples.latents, scores, samples.prompt_index)
        train_step_dpo(
            policy, make_scheduler(), pairs, make_embeds(),
            StepDPOConfig(steps=30, lr=3e-3, beta_dpo=500.0, gamma=gamma),
            tmp_path / f"lora-{turn}", curves=False, progress=False,
        )  # fmt: skip
    for before, after, error in zip(means, means[1:], errors, strict=False):
        assert after - before > 5 * error
