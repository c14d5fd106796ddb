# SPDX-License-Identifier: Apache-2.0
"""The output of a pipeline call."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

__all__ = ["MSDDAPipelineOutput"]


@dataclass
class MSDDAPipelineOutput(StableDiffusionPipelineOutput):  # type: ignore[misc]  # no types
    """Images, as in diffusers, and for approximate modes an estimate of their error.

    Attributes:
        images: List of PIL images, or an array or tensor.
        nsfw_content_detected: One flag per image; None without a safety checker.
        step_kl_estimate: Estimated KL divergence of each step from the exact one, (T, B) nats; not
            a bound. 0 for exact steps; infinite for steps that are not exact and add no noise. None
            with `mode="exact"`.
    """

    step_kl_estimate: Tensor | None = None
