# SPDX-License-Identifier: Apache-2.0
r"""What merged steps cost over a path, foretold from a pilot, and which steps are merged for it.

A merged step and the exact one are Gaussians of one variance, so the divergence of the two is

    KL_k = |mu_merged - mu_exact|^2 / (2 sigma_w^2)    nats,

and these add up along a path (the chain rule). To second order in the adapters the merged network
differs from the mixture of the objectives' outputs, with the shares c_i of `merging`, by

    f(sum_i c_i d_i) - sum_i c_i f(d_i) = -1/2 sum_{i<j} c_i c_j f''(d_i - d_j, d_i - d_j),

so the shares of a step count in `KL_k` by a factor that is known, `kl_scale`,

    s_k = (sum_i a_i)^2 (sum_{i<j} |c_i c_j|)^2 / (2 sigma_w^2),    c_i = a_i / sum_j a_j,

and `KL_k / s_k` is a property of the networks, the prompt and the state. A pilot measures it on a
few images, at weights all over the simplex; see `pilot`. For other images, at any weights, the same
numbers foretell a mean and, as they are roughly lognormal, a limit for one more image.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from msdda_fast.pipelines.stable_diffusion.merging import output_counts
from msdda_fast.pipelines.stable_diffusion.modes import StepPlan
from msdda_fast.steps.coefficients import CoefficientTable

__all__ = ["LIMIT_LEVEL", "PILOTS", "Forecast", "PathKL", "Pilot", "forecast", "kl_scale"]

PILOTS = 12  #: Images of a pilot.
LIMIT_LEVEL = 0.99  #: Of the limits: how many images like a pilot's stay below theirs.
#: Student's t at that level with PILOTS - 1 degrees of freedom.
QUANTILE = 2.71808


@dataclass(frozen=True)
class PathKL:
    """How far the paths of B images are from exact ones, foretold before the first step.

    Attributes:
        estimate: Mean KL divergence of the path from the exact one, (B,) nats; 0 where every step
            was exact.
        upper: What 99 of 100 images like those of the pilot stay below, (B,) nats.
        budget: What `upper` was to be at most, nats; None where nothing could be merged.
        pilot_forwards: Forwards of a network on one image that the pilot took. A pilot serves all
            later calls of the same settings, whatever their weights.
    """

    estimate: Tensor
    upper: Tensor
    budget: float | None
    pilot_forwards: int


@dataclass(frozen=True)
class Pilot:
    """What a pilot measured.

    Attributes:
        ratio: `KL_k / s_k` of n images, (T, n) float64 on the host; infinite where it has no limit.
        rounding: What bfloat16 networks cost: KL divergence of a path from that of float32 ones,
            in nats.
        forwards: Forwards of a network on one image that it took.
    """

    ratio: Tensor
    rounding: float
    forwards: int


@dataclass(frozen=True)
class Forecast:
    """The steps of B images, and what the merged ones are foretold to cost.

    Attributes:
        plan: Which steps are exact.
        kl: What each step costs if an image behaves as one of the n of the pilot, (T, B, n) nats; 0
            for exact steps.
        budget: For the limit of the sum, nats.
        pilot_forwards: See `PathKL`.
    """

    plan: StepPlan
    kl: Tensor
    budget: float
    pilot_forwards: int

    @property
    def step_kl(self) -> Tensor:
        """The mean of each step, (T, B) nats."""
        return self.kl.mean(-1)

    def path_kl(self, steps: int) -> PathKL:
        """Return the divergence of the first `steps` steps."""
        totals = self.kl[:steps].sum(0)
        return PathKL(totals.mean(-1), _limit(totals), self.budget, self.pilot_forwards)


def kl_scale(table: CoefficientTable) -> Tensor:
    """Return s_k, (T, B) float64: the KL of a merged step for `|f''(d_i - d_j, d_i - d_j)|` = 2.

    0 where one output alone has influence; infinite where others have and the step adds no noise.
    """
    counts = output_counts(table)
    total, sizes = counts.sum(-1), counts.abs()
    pairs = (sizes.sum(-1).square() - sizes.square().sum(-1)).clamp(min=0) / 2
    scale = (pairs / total).square() / (2 * table.std.square())
    return scale.masked_fill(pairs == 0, 0.0)


def forecast(table: CoefficientTable, pilot: Pilot, budget: float | None) -> Forecast:
    """Choose the steps to merge: as many as stay within the budget, the cheapest first.

    Each image has its own, so that what shares a batch does not matter.

    Args:
        table: Of the images.
        pilot: Of their settings.
        budget: Nats that the limit of the path's divergence may reach; None: `pilot.rounding`.
    """
    budget = pilot.rounding if budget is None else float(budget)
    scale = kl_scale(table)
    kl = scale[..., None] * pilot.ratio[:, None]
    kl = kl.masked_fill(scale[..., None] == 0, 0.0)  # a ratio may be infinite
    order = kl.mean(-1).argsort(dim=0, stable=True)
    totals = kl.gather(0, order[..., None].expand_as(kl)).cumsum(0)
    fits = _limit(totals) <= budget  # (T, B): whether the cheapest k + 1 steps may be merged
    place = torch.arange(1, len(scale) + 1)[:, None]
    merged = (fits * place).amax(0)
    exact = torch.empty_like(fits).scatter_(0, order, place > merged)
    return Forecast(
        StepPlan.of(exact, table), kl.masked_fill(exact[..., None], 0.0), budget, pilot.forwards
    )


def _limit(totals: Tensor) -> Tensor:
    """The upper prediction limit for one more of n lognormal numbers, (..., n) to (...).

    That is exp(m + t s sqrt(1 + 1/n)) with the mean m and the deviation s of their logarithms.
    """
    logs = totals.log()
    spread = QUANTILE * sqrt(1 + 1 / totals.shape[-1]) * logs.std(-1)
    limit = (logs.mean(-1) + spread).exp().nan_to_num(nan=float("inf"))
    return limit.masked_fill((totals == 0).all(-1), 0.0)
