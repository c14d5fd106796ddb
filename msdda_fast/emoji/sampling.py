# SPDX-License-Identifier: Apache-2.0
"""Draw latents and images from the shipped model, for training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from msdda_fast.pipelines.identity import model_identity
from msdda_fast.pipelines.stable_diffusion.decoding import decode as vae_decode
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.rewards import load_reward
from msdda_fast.training.collect import Collection, Sampler

NUM_STEPS = 25
DTYPE = torch.float32  # of the networks, as of the latents: nothing of a KL is rounding
GUIDANCE_SCALE = 1.0  # none: the policy that DPO trains is the one that is sampled


def sampler(pipe: MSDDAPipeline, weights: Mapping[str, float]) -> Sampler:
    """Return a function (prompts, seeds) -> (latents, images in [0, 1]) with fixed preferences."""
    pipe.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def sample(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        latents = pipe(
            list(prompts),
            weights=dict(weights),
            seed=list(seeds),
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            output_type="latent",
        ).images
        return latents, decode(pipe, latents)

    settings = {
        "weights": dict(weights),
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        **model_identity(pipe),
    }
    return Sampler(sample, settings)


def decode(pipe: MSDDAPipeline, latents: Tensor) -> Tensor:
    """Decode latents, (N, C, H, W) in the units of the denoiser, to images in [0, 1], float32."""
    images = vae_decode(pipe.vae, latents)
    return (images.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def score(pipe: MSDDAPipeline, samples: Collection, prompts: Sequence[str], reward: str) -> Tensor:
    """Return a reward of each sample, shape (N,): the stored one, else that of its decoded image.

    Args:
        pipe: The pipeline whose autoencoder the latents belong to.
        samples: N samples; `prompt_index` points into `prompts`.
        reward: A name that `load_reward` knows.
    """
    if reward in samples.scores:
        return samples.scores[reward]
    scorer, rows = load_reward(reward), []
    for at in range(0, len(samples.seeds), 48):
        chunk = slice(at, at + 48)
        texts = [prompts[index] for index in samples.prompt_index[chunk].tolist()]
        rows.append(scorer(decode(pipe, samples.latents[chunk]), texts))
    return torch.cat(rows)
