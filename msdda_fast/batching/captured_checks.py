# SPDX-License-Identifier: Apache-2.0
"""Checks requests against Stable Diffusion's own pipeline."""

from __future__ import annotations

from typing import Any

import torch

from msdda_fast.batching.checks import check_cost, check_pixels, field
from msdda_fast.batching.limits import Limits, integer
from msdda_fast.batching.request import ImageRequest
from msdda_fast.batching.ticket import Shape
from msdda_fast.pipelines import request as call
from msdda_fast.pipelines.preferences import call_strength
from msdda_fast.pipelines.prompt_length import Readers
from msdda_fast.pipelines.regions import check_masks, check_softness
from msdda_fast.pipelines.schedulers import sampling_levels
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.pipelines.stable_diffusion.tables import Tables
from msdda_fast.steps.coefficients import CoefficientTable
from msdda_fast.steps.schedulers import scheduler_rule
from msdda_fast.types import ZeroVariancePolicy
from msdda_fast.weights import preference_schedule

__all__ = ["CapturedChecks"]


class CapturedChecks:
    """Checks requests for one pipeline; see `Checks`.

    Args:
        pipe: The pipeline whose objectives, scheduler and tokenizer requests are checked against.
        limits: Bounds of one request.
    """

    def __init__(self, pipe: MSDDAPipeline, limits: Limits) -> None:
        self._pipe, self._limits = pipe, limits
        self._readers = Readers((pipe.tokenizer, None))

    def check_text(self, text: Any) -> None:  # noqa: ANN401 - it is what is checked
        """Raise `InvalidRequest` if a prompt is not read to its end."""
        self._readers.check(text)

    def of(
        self, request: ImageRequest, count: int, zero_variance: ZeroVariancePolicy
    ) -> tuple[Shape, dict[str, Any]]:
        """Return the shape of a request, and its coefficients; see `Checks`."""
        shape = self._shape(request, count)
        table = self._table(request, shape, zero_variance)
        return shape._replace(with_base=table.has_base), {"table": table}

    def native_size(self) -> tuple[int, int]:
        """Default width and height, in pixels."""
        config, factor = self._pipe.unet.config, self._pipe.vae_scale_factor
        *_, rows, columns = call.latent_shape(1, config, factor, None, None)
        return columns * factor, rows * factor

    def plain(
        self, num_inference_steps: int, height: int | None = None, width: int | None = None
    ) -> list[ImageRequest]:
        """Return a request without guidance and one with it; see `Checks`."""
        return [
            ImageRequest(
                "",
                seed=0,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance,
                height=height,
                width=width,
            )
            for guidance in (1.0, 2.0)
        ]

    def _shape(self, request: ImageRequest, count: int) -> Shape:
        config, factor = self._pipe.unet.config, self._pipe.vae_scale_factor
        with field("height"):
            rows = call.latent_shape(1, config, factor, request.height, None)[2]
        with field("width"):
            columns = call.latent_shape(1, config, factor, None, request.width)[3]
        height, width = rows * factor, columns * factor
        with field("height"):
            check_pixels(self._limits, height, width)
        with field("num_inference_steps"):
            steps = integer("num_inference_steps", request.num_inference_steps)
            scheduler_rule(self._pipe.scheduler, steps)
            check_cost(self._limits, count, height, width, steps)
        return Shape(height, width, steps)

    def _table(
        self, request: ImageRequest, shape: Shape, zero_variance: ZeroVariancePolicy
    ) -> CoefficientTable:
        pipe, steps = self._pipe, shape.steps
        objectives, factor = pipe.objectives, pipe.vae_scale_factor
        with field("guidance_scale"):
            guidance = call.objective_guidance(objectives, request.guidance_scale)
        with field("weights"):
            grid = scheduler_rule(pipe.scheduler, steps).timesteps
            weights = preference_schedule(
                request.weights, list(objectives), 1, steps, timesteps=grid
            )
        with field("strength"):
            call_strength(list(objectives), request.strength, None, weights, 1)
        with field("mask_softness"):
            check_softness(request.mask_softness, request.masks)
        with field("masks"):
            regions = check_masks(
                request.masks, list(objectives), 1, *shape[:2], softness=request.mask_softness
            )
            if regions is not None:
                regions.covered_with(weights)
        with field("weights"):
            tables = Tables(
                scheduler=pipe.scheduler,
                num_steps=steps,
                objectives=objectives,
                etas=sampling_levels(pipe.scheduler, objectives, None),
                guidance_scale=guidance,
                strength=request.strength,
                kl_weights=None,
                zero_variance=zero_variance,
                rates=None,
                extrapolate=False,
                fusion="posterior",
                masks=request.masks,
                mask_softness=request.mask_softness,
                latent_size=(shape.height // factor, shape.width // factor),
                scale=factor,
            )
            table = tables.of(request.weights, 1)
        dtype = torch.float64 if pipe.unet.dtype == torch.float64 else torch.float32
        return table.to("cpu", dtype)
