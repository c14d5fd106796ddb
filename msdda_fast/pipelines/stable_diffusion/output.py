# SPDX-License-Identifier: Apache-2.0
"""What a call returns."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

__all__ = ["MSDDAPipelineOutput"]


@dataclass
class MSDDAPipelineOutput(StableDiffusionPipelineOutput):  # type: ignore[misc]  # no types
    """Images, as in diffusers, and for approximate modes how far their steps may be off.

    Attributes:
        images: List of PIL images, or an array or tensor.
        nsfw_content_detected: One flag per image; None without a safety checker.
        step_kl_estimate: An estimate, not a bound: KL divergence of every step from the exact one,
            (T, B) nats. It is 0 where a step was exact, and infinite where the sampler adds no
            noise and the step was not. None with `mode="exact"`.
    """

    step_kl_estimate: Tensor | None = None
