# SPDX-License-Identifier: Apache-2.0
r"""How strongly each objective acts, and in which timesteps: what the base contributes to a step.

With strength s_i the bracket of objective i in Eq. 7 becomes

    p_pre,eta_i(x_prev | x_t)^(1 - s_i) p_i(x_prev | x_t)^(s_i),

the base at the objective's *own* noise level. Both have the variance sigma_i^2, so the bracket has
it, too, and the mean (1 - s_i) mu_pre,i + s_i mu_i: shares and sigma_w do not depend on s, and no
s leaves a precision that is not positive. s = 0 is the base, s = 1 Eq. 7, s > 1 goes beyond.

Means are affine in outputs, so in a table the base is one more column, with the coefficient
sum_i (1 - s_i) share_i B_i. Outside of an objective's timesteps its strength is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape, InvalidWeights
from msdda_fast.levels import TimestepRange, check_range
from msdda_fast.weights import as_host_float64

__all__ = ["Folding", "check_strength", "folding", "relative_strength"]


class Folding(NamedTuple):
    """The strengths of a table's steps.

    Attributes:
        strength: s, (T, 1 or B, M) float64 on the host, 0 where an objective does not act.
        acts: Whether an objective acts in a step, weights aside, (T, M).
        with_base: Whether the base stands in for an objective, weights aside, (T, M).
    """

    strength: Tensor
    acts: Tensor
    with_base: Tensor

    def columns(self, values: Tensor) -> Tensor:
        """Split what objectives count, (T, B, M), between them and the base: (T, B, M + 1)."""
        base = ((1 - self.strength) * values).sum(-1, keepdim=True)
        return torch.cat([self.strength * values, base], -1)

    def influence(self, share: Tensor) -> Tensor:
        """Which outputs the samples of a step use, (T, M + 1), for shares (T, B, M)."""
        own = ((share != 0) & (self.strength != 0)).any(1)
        base = ((share != 0) & (self.strength != 1)).any(-1).any(1)
        return torch.cat([own, base[:, None]], -1)

    def reads(self) -> Tensor:
        """Which outputs a step may use whatever the weights are, (T, M + 1)."""
        return torch.cat([self.acts, self.with_base.any(-1, keepdim=True)], -1)


def check_strength(strength: Tensor) -> None:
    """Raise `InvalidWeights` unless all strengths are finite and not negative."""
    if not bool((strength.isfinite() & (strength >= 0)).all()):
        raise InvalidWeights(
            f"strength must be finite and not negative, got {strength.tolist()!r:.80}"
        )


def folding(
    strength: float | Sequence[Any] | Tensor | None,
    ranges: Sequence[TimestepRange | None] | None,
    timesteps: Tensor,
    count: int,
) -> Folding | None:
    """Return the strengths of T steps; None: no strength and no range was given.

    Args:
        strength: s >= 0, no unit: a number, (M,), (B, M) or (T, B, M). None: 1.
        ranges: The timesteps in which each of M objectives acts; None: in all.
        timesteps: (T,), as the rule has them.
        count: M.

    Raises:
        InvalidWeights: A strength is negative or not finite.
        InvalidShape: Strengths of another shape, or not one range per objective.
        InvalidSchedule: A range has no timesteps.
    """
    if strength is None and not any(ranges or ()):
        return None
    s = as_host_float64(1.0 if strength is None else strength, "strength")
    if s.ndim > 3 or (s.ndim and s.shape[-1] != count):
        raise InvalidShape(
            f"strength has shape {tuple(s.shape)}, expected (), (M,), (B, M) or (T, B, M) with "
            f"M = {count}"
        )
    if s.ndim == 3 and len(s) not in (1, len(timesteps)):
        raise InvalidShape(f"strength has {len(s)} steps, and there are T = {len(timesteps)}")
    check_strength(s)
    s = s.expand(count) if s.ndim == 0 else s
    s = s[(None,) * (3 - s.ndim)]  # (T, B, M)
    inside = torch.ones(len(timesteps), count, dtype=torch.bool)
    if ranges is not None:
        if len(ranges) != count:
            raise InvalidShape(f"{len(ranges)} ranges of timesteps for M = {count} objectives")
        for m, given in enumerate(ranges):
            if given is not None:
                first, last = check_range(given)
                t = timesteps.to("cpu", torch.float64)
                inside[:, m] = (t >= first) & (t <= last)
    acts = inside & (s != 0).flatten(0, 1).any(0)
    with_base = ~inside | (s != 1).flatten(0, 1).any(0)
    return Folding(torch.where(inside[:, None], s, 0.0), acts, with_base)


def relative_strength(
    kl_weights: Sequence[float] | Tensor, weights: Tensor, strength: float | Tensor = 1.0
) -> Tensor:
    """Return the strengths that make up for objectives aligned with KL weights of their own.

    Where objective i is the optimum for its reward less lambda_i times the KL divergence, the
    optimum for sum_i w_i r_i at one lambda is

        p_pre^(1 - sum_i w_i lambda_i / lambda) prod_i p_i^(w_i lambda_i / lambda),

    so s_i = lambda_i / lambda; here lambda = sum_j w_j lambda_j, with which exponents sum to 1.

    Args:
        kl_weights: lambda, (M,), > 0.
        weights: w, (..., M).
        strength: Multiplies the result, and divides lambda; broadcastable to `weights`.

    Returns: (..., M) float64.

    Raises:
        InvalidWeights: A KL weight is not positive and finite, or sum_j w_j lambda_j is not
            positive, which takes negative weights.
        InvalidShape: `kl_weights` is not (M,).
    """
    values = as_host_float64(kl_weights, "kl_weights")
    if values.shape != weights.shape[-1:]:
        raise InvalidShape(
            f"kl_weights has shape {tuple(values.shape)}, expected ({weights.shape[-1]},)"
        )
    if not bool((values.isfinite() & (values > 0)).all()):
        raise InvalidWeights(f"kl_weights must be positive and finite, got {values.tolist()}")
    mean = (weights * values).sum(-1, keepdim=True)
    if not bool((mean > 0).all()):
        raise InvalidWeights("the weighted mean of kl_weights must be positive")
    return strength * values / mean
