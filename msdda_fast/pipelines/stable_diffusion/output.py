# SPDX-License-Identifier: Apache-2.0
"""The output of a pipeline call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

from msdda_fast.pipelines.stable_diffusion.modes import Mode
from msdda_fast.pipelines.stable_diffusion.path_kl import Forecast, PathKL
from msdda_fast.pipelines.stable_diffusion.sampling import Sampled

__all__ = ["MSDDAPipelineOutput", "answer", "receipt"]


@dataclass
class MSDDAPipelineOutput(StableDiffusionPipelineOutput):  # type: ignore[misc]  # no types
    """Images, as in diffusers, and for approximate modes an estimate of their error.

    Attributes:
        images: List of PIL images, or an array or tensor.
        nsfw_content_detected: One flag per image; None without a safety checker.
        step_kl_estimate: Estimated KL divergence of each step from the exact one, (T, B) nats; not
            a bound. 0 for exact steps; infinite for steps that are not exact and add no noise. None
            with `mode="exact"`.
        path_kl: With `mode="auto"` how far the path of each image is from an exact one: an
            estimate, and a limit with 99% confidence.
        forwards: How many networks ran on each image in this call, a pass with guidance counted
            once. A pilot's are in `path_kl`.
    """

    step_kl_estimate: Tensor | None = None
    path_kl: PathKL | None = None
    forwards: int = 0


def receipt(mode: Mode, done: Sampled, forecast: Forecast | None) -> dict[str, Any]:
    """Return the fields of an output that say how it was made.

    Args:
        mode: Of the call.
        done: What was sampled, perhaps not to the end.
        forecast: Of mode "auto"; None: it ran exactly.
    """
    if mode == "exact":
        return {"forwards": done.forwards}
    if mode == "merged":
        return {"forwards": done.forwards, "step_kl_estimate": done.step_kl}
    step_kl = done.step_kl
    path_kl = PathKL(none := torch.zeros(len(done.x), dtype=torch.float64), none, None, 0)
    if forecast is not None:
        path_kl = forecast.path_kl(done.steps)
        step_kl = forecast.step_kl.to(step_kl)
        step_kl[done.steps :] = 0.0
    return {"forwards": done.forwards, "step_kl_estimate": step_kl, "path_kl": path_kl}


def answer(
    images: Any,  # noqa: ANN401 - of the output type
    flagged: list[bool] | None,
    fields: dict[str, Any],
    *,
    as_output: bool,
) -> MSDDAPipelineOutput | tuple[Any, list[bool] | None]:
    """Return what a call returns: an output with the fields of `receipt`, or (images, flags)."""
    if not as_output:
        return images, flagged
    return MSDDAPipelineOutput(images=images, nsfw_content_detected=flagged, **fields)
