# SPDX-License-Identifier: Apache-2.0
r"""Preferences of every pixel, and the coefficients of steps that have them.

Posteriors are isotropic, so Theorem 1 holds for each element p of a latent with weights of its own:

    share_i(p) = (w_i(p) / tau_i^2) / P(p),   P(p) = sum_j w_j(p) / tau_j^2,   var_w(p) = 1 / P(p).

The objectives' own means A_i x_t + B_i m_i do not depend on weights. So a step with weights of
every pixel is M rows of coefficients, one for each mean, and Eq. 7 elementwise, with noise, on the
means (`kernels.fused_step`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from msdda_fast.steps.shares import scaled_weights
from msdda_fast.weights import normalise_weights

__all__ = ["PixelStep", "PixelTable", "PixelWeights", "weights_of_step"]


@dataclass(frozen=True, slots=True)
class PixelWeights:
    """Preferences w of B images at every pixel and step: `w(p) = own(p) + rest(p) v`.

    v are the preferences of the step among the objectives that have no weights of their own.

    Attributes:
        own: (B, M, *S) float64 on the host, each axis of S that of the latents or 1; no unit.
        rest: (B, *S), what `own` leaves of 1.
        free: (B, M), whether an objective shares the rest.
    """

    own: Tensor
    rest: Tensor
    free: Tensor

    @classmethod
    def of(cls, weights: Tensor) -> Self:
        """Return weights (B, M, *S) that leave nothing.

        Raises:
            InvalidWeights: A pixel's are negative or not finite, or do not sum to 1.
        """
        own = normalise_weights(weights.detach().cpu(), axis=1)
        return cls(own, torch.zeros_like(own[:, 0]), torch.zeros(own.shape[:2], dtype=torch.bool))

    @classmethod
    def constant(cls, batch_size: int, count: int, axes: int) -> Self:
        """Return those of images that have the weights of a step everywhere; S has `axes` axes."""
        ones = (1,) * axes
        own = torch.zeros(batch_size, count, *ones, dtype=torch.float64)
        rest = torch.ones(batch_size, *ones, dtype=torch.float64)
        return cls(own, rest, torch.ones(batch_size, count, dtype=torch.bool))

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, M, *S)."""
        return tuple(self.own.shape)

    def columns(self, objectives: list[int]) -> Self:
        """Return those of some objectives; the others must have the weight 0."""
        return replace(self, own=self.own[:, objectives], free=self.free[:, objectives])

    def in_latents(self, axes: int) -> Self:
        """Return weights (B, M, h, w) for latents whose h and w come behind `axes` other axes."""
        ones = (1,) * axes
        return self.reshaped(lambda one: one.view(len(one), *ones, *one.shape[1:]))

    def reshaped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return them with `change` done to (N, *S), of any number N."""
        own = change(self.own.flatten(0, 1))
        return replace(
            self, own=own.view(*self.own.shape[:2], *own.shape[1:]), rest=change(self.rest)
        )

    def of_rest(self, weights: Tensor) -> Tensor:
        """Return v, (..., B, M), for the preferences (..., B, M) of a step; 0 where all are."""
        v = torch.where(self.free, weights, 0.0)
        total = v.sum(-1, keepdim=True)
        return torch.where(total != 0, v / total, 0.0)

    def mean(self, weights: Tensor) -> Tensor:
        """Return the weights (T, B, M) that an image has on average, for those of the steps."""
        rest = self.rest.flatten(1).mean(1)[:, None]
        return self.own.flatten(2).mean(2) + rest * self.of_rest(weights)

    def at(self, weights: Tensor) -> Tensor:
        """Return weights (M, B, *S), objective first, for the preferences (B, M) of a step."""
        axes = (1,) * (self.own.ndim - 2)
        v = self.of_rest(weights).view(*self.own.shape[:2], *axes)
        return (self.own + self.rest[:, None] * v).transpose(0, 1)


class PixelStep(NamedTuple):
    """What a step with weights of every pixel reads, apart from networks' outputs.

    Attributes:
        means: (M, B, C), the row of each objective's own mean; see `coefficients.Layout`.
        variances: tau_i^2, (M, B), latent units squared; 0 where no noise is added.
        weights: (M, B, *S), no unit, up to a factor per pixel.
    """

    means: Tensor
    variances: Tensor
    weights: Tensor

    @property
    def share(self) -> Tensor:
        """What each mean counts, (M, B, *S), sum 1 over M."""
        axes = (1,) * (self.weights.ndim - 2)
        scaled, _ = scaled_weights(self.variances.view(*self.variances.shape, *axes), self.weights)
        return scaled / scaled.sum(0)


@dataclass(frozen=True, slots=True)
class PixelTable:
    """The part of a `CoefficientTable` that weights of every pixel need.

    The weights of step k are `own factor_k + rest mixed_k`, with numbers (M, B) of the step; where
    variances vanish the factors hold the limit of their ratios.

    Attributes:
        means: (M, T, B, C), rows of each objective's own mean; 0 where it has no weight.
        numbers: (T, 3, M, B): variances, factors and `mixed`.
        own: (M, B, *S), no unit.
        rest: (B, *S), no unit.
        parts: (M, T, B, N) float64 on the host: which outputs, the base's included, the prediction
            of each objective is made of.
    """

    means: Tensor
    numbers: Tensor
    own: Tensor
    rest: Tensor
    parts: Tensor

    def step(self, k: int) -> PixelStep:
        """Return what step k reads."""
        variances, factor, mixed = self.numbers[k]
        weights = weights_of_step(self.own, self.rest, factor, mixed)
        return PixelStep(self.means[:, k], variances, weights)

    def images(self, part: slice) -> PixelTable:
        """The table of some of its images."""
        return replace(
            self,
            means=self.means[:, :, part],
            numbers=self.numbers[..., part],
            own=self.own[:, part],
            rest=self.rest[part],
            parts=self.parts[:, :, part],
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PixelTable:
        """The table on a device and in a dtype; `parts` stay."""
        moved = {
            name: getattr(self, name).to(device=device, dtype=dtype)
            for name in ("means", "numbers", "own", "rest")
        }
        return replace(self, **moved)


def weights_of_step(own: Tensor, rest: Tensor, factor: Tensor, mixed: Tensor) -> Tensor:
    """Return `own factor + rest mixed`, (M, B, *S), for numbers (M, B) of a step.

    Args:
        own, rest: (M, B, *S) and (B, *S).
        factor, mixed: (M, B).
    """
    shape = (*factor.shape, *(1,) * (own.ndim - 2))
    return torch.addcmul(own * factor.view(shape), rest, mixed.view(shape))
