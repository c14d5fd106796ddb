# SPDX-License-Identifier: Apache-2.0
"""Draw latents and images from the shipped model for collecting and evaluating."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from msdda_fast.pipeline.stable_diffusion import MSDDAPipeline
from msdda_fast.training.collect import SampleFn

NUM_STEPS = 25
DTYPE = torch.bfloat16  # of the networks; latents stay float32 between steps
GUIDANCE_SCALE = 1.0  # none: the policy that DPO trains is the one that is sampled


def sampler(
    pipe: MSDDAPipeline, weights: Mapping[str, float], etas: Mapping[str, float] | None = None
) -> SampleFn:
    """Return a function (prompts, seeds) -> (latents, images in [0, 1]) with fixed preferences."""
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"etas": dict(etas)} if etas else {}

    @torch.inference_mode()
    def sample(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        latents = pipe(
            list(prompts),
            weights=dict(weights),
            seed=list(seeds),
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            output_type="latent",
            **options,
        ).images
        decoded = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor)
        return latents, (decoded.sample.float() / 2 + 0.5).clamp(0, 1)

    return sample
