# SPDX-License-Identifier: Apache-2.0
"""The settings of a call that make coefficients of weights; a pilot has them at other weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from msdda_fast.objective import Objective
from msdda_fast.pipelines.call_preferences import check_kl_weights
from msdda_fast.pipelines.preferences import StrengthsLike, preferences
from msdda_fast.pipelines.regions import MasksLike, check_masks
from msdda_fast.steps.coefficients import CoefficientTable
from msdda_fast.steps.schedulers import scheduler_rule
from msdda_fast.steps.table import coefficient_table
from msdda_fast.types import Fusion, Scheduler, WeightSchedule, ZeroVariancePolicy
from msdda_fast.weight_ranges import has_ranges

__all__ = ["Tables"]


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Coefficients as a function of weights; fields as in the call, for objectives in order.

    Attributes:
        latent_size: (h, w) of the latents.
        scale: Pixels of the image per latent pixel.
    """

    scheduler: Scheduler
    num_steps: int
    objectives: Mapping[str, Objective]
    etas: Sequence[float] | None
    guidance_scale: Sequence[float]
    strength: StrengthsLike | None
    kl_weights: Mapping[str, float] | Sequence[float] | None
    zero_variance: ZeroVariancePolicy
    rates: Sequence[float] | None
    extrapolate: bool
    fusion: Fusion
    masks: MasksLike | None
    mask_softness: float | None
    latent_size: tuple[int, int]
    scale: int

    def of(
        self, weights: WeightSchedule, batch_size: int, images_per_prompt: int = 1
    ) -> CoefficientTable:
        """Return the table of B images, float64 on the host; see `coefficient_table`.

        Args:
            weights: As in the call.
            batch_size: B.
            images_per_prompt: How many neighbouring images a prompt has.
        """
        height, width = self.latent_size
        regions = check_masks(
            self.masks,
            list(self.objectives),
            batch_size,
            height * self.scale,
            width * self.scale,
            images_per_prompt=images_per_prompt,
            softness=self.mask_softness,
        )
        check_kl_weights(self.kl_weights, regions)
        timesteps = None
        if has_ranges(weights, list(self.objectives)):
            timesteps = scheduler_rule(self.scheduler, self.num_steps).timesteps
        prefers = preferences(
            self.objectives,
            weights,
            self.strength,
            self.kl_weights,
            batch_size=batch_size,
            num_steps=self.num_steps,
            images_per_prompt=images_per_prompt,
            extrapolate=self.extrapolate,
            timesteps=timesteps,
        )
        pixels = None
        if regions is not None:
            regions = regions.covered_with(prefers["weights"])
            pixels = regions.on(height, width, self.scale).in_latents(1)
        return coefficient_table(
            self.scheduler,
            self.num_steps,
            etas=self.etas,
            **prefers,
            pixels=pixels,
            guidance_scale=self.guidance_scale,
            zero_variance=self.zero_variance,
            rates=self.rates,
            extrapolate=self.extrapolate,
            fusion=self.fusion,
            dtype=torch.float64,
        )

    @property
    def strength_is_shared(self) -> bool:
        """Whether all images have the same strengths, up to what KL weights make of weights."""
        if isinstance(self.strength, Mapping | None):
            return True
        if isinstance(self.strength, Sequence) and any(
            isinstance(one, Mapping) for one in self.strength
        ):
            return len(self.strength) == 1
        values = torch.as_tensor(self.strength)
        return values.ndim < 2 or len(values) == 1
