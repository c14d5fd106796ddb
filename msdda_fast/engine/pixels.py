# SPDX-License-Identifier: Apache-2.0
r"""Steps with a preference of each pixel.

A posterior N(mu_i, sigma_i^2 I) is a product over the elements of a latent, and so is Theorem 1:
with weights w_i(p) at element p,

    P(p) = sum_j w_j(p) / sigma_j^2,    share_i(p) = (w_i(p) / sigma_i^2) / P(p),
    x_prev(p) = sum_i share_i(p) mu_i(p) + P(p)^(-1/2) z(p),      mu_i = A_i x + B_i m_i.

Where a rule's deviations rate_i u vanish, u = 0, the rates stand for them and there is no noise.
Nothing is mixed across pixels but by the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdda_fast.engine.noise import NoiseSource, StepNoise
from msdda_fast.errors import InvalidSchedule, InvalidShape, ZeroVariance
from msdda_fast.kernels.fused_step import fast_fuse_step
from msdda_fast.steps.rules import MixingRule
from msdda_fast.steps.shares import check_policy, has_no_limit
from msdda_fast.weights import as_host_float64, normalise_weights, preference_weights

if TYPE_CHECKING:
    from msdda_fast.steps.rules import Rule
    from msdda_fast.types import Backend, WeightSchedule, WeightsLike, ZeroVariancePolicy

__all__ = ["PixelGeneration", "PixelTable", "pixel_table", "pixel_weights"]


def pixel_weights(weights: WeightSchedule, num_steps: int, ndim: int) -> list[WeightsLike] | None:
    """Return the preferences of T = `num_steps` steps if some are per pixel, else None.

    Those are arrays (B, M, *S), for samples (B, *S) of `ndim` >= 3 axes; a callable is asked for
    every step.
    """
    asked: list[Any] = [weights(k) if callable(weights) else weights for k in range(num_steps)]
    return asked if any(_is_per_pixel(one, ndim) for one in asked) else None


def _is_per_pixel(weights: object, ndim: int) -> bool:
    return ndim >= 3 and getattr(weights, "ndim", 0) == ndim + 1


@dataclass(frozen=True, slots=True)
class PixelTable:
    """T fused steps of M objectives with weights per pixel, in sampling order.

    Attributes:
        x_scale, output_scale, rate: A, B and c of each step and objective, (T, M) float64 on the
            host; see `steps.rules.StepTerms`.
        unit: u, (T,) likewise, latent units.
        weights: Of each step, (M, B or 1, *S) with axes of size 1 for what is alike; sum 1 over M.
        influence: (T, M) on the host, whether an objective has weight anywhere.
        zero_variance, rates, extrapolate: As in `fast_fuse_step`.
    """

    x_scale: Tensor
    output_scale: Tensor
    rate: Tensor
    unit: Tensor
    weights: Sequence[Tensor]
    influence: Tensor
    zero_variance: ZeroVariancePolicy
    rates: Tensor | None
    extrapolate: bool

    def __len__(self) -> int:
        return len(self.weights)

    def adds_noise(self, k: int) -> bool:
        """Whether step k draws z."""
        return bool(self.unit[k] > 0 and (self.rate[k] > 0).any())

    def step(
        self,
        k: int,
        x: Tensor,
        outputs: Sequence[Tensor | None],
        noise: StepNoise,
        backend: Backend,
    ) -> Tensor:
        """Return x_prev, (B, *S), in the dtype of `x`.

        Args:
            k: The step.
            x: The state, (B, *S), latent units.
            outputs: (B, *S) of each objective; None where it has no influence.
            noise: z, or where it comes from; not read by a step that adds none.
            backend: Of the fused step.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        pairs = zip(self.x_scale[k].tolist(), self.output_scale[k].tolist(), strict=True)
        means = [
            None if output is None else a * wide + b * output.to(wide.dtype)
            for output, (a, b) in zip(outputs, pairs, strict=True)
        ]
        if not self.adds_noise(k):
            noise = {"noise": torch.zeros_like(wide)}
        return self._fuse(k, means, float(self.unit[k]) or 1.0, noise, backend).to(x.dtype)

    def mixture(self, k: int, outputs: Sequence[Tensor | None], backend: Backend) -> Tensor:
        """Return sum_i share_i(p) m_i(p), (B, *S): where the step heads for."""
        like = next(output for output in outputs if output is not None)
        return self._fuse(k, outputs, 1.0, {"noise": torch.zeros_like(like)}, backend)

    def _fuse(
        self,
        k: int,
        means: Sequence[Tensor | None],
        unit: float,
        noise: StepNoise,
        backend: Backend,
    ) -> Tensor:
        use = [m for m, mean in enumerate(means) if mean is not None]
        rates = None if self.rates is None else self.rates[use]
        # zero and positive variances at one pixel were refused when the table was made
        policy = "dominate" if self.zero_variance == "error" else self.zero_variance
        fused = fast_fuse_step(
            [mean for mean in means if mean is not None],
            (self.rate[k, use] * unit) ** 2,
            self.weights[k][use],
            backend=backend,
            zero_variance=policy,
            rates=rates,
            extrapolate=self.extrapolate,
            **noise,
        )
        assert isinstance(fused, Tensor)  # no moments were asked for
        return fused


def pixel_table(
    rule: Rule,
    levels: Sequence[float] | Tensor,
    weights: Sequence[WeightsLike],
    shape: torch.Size,
    *,
    zero_variance: ZeroVariancePolicy = "error",
    rates: Sequence[float] | Tensor | None = None,
    extrapolate: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> PixelTable:
    """Build T fused steps with weights per pixel.

    Args:
        rule: The sampler on its T steps.
        levels: (M,), in the range and meaning of the rule.
        weights: T preferences: (B or 1, M, *S) with axes of S of size 1 for what is alike, or as in
            `preference_weights`, for all pixels. Sum 1 over M at every pixel.
        shape: (B, *S), of the samples.
        zero_variance, rates, extrapolate: As in `coefficient_table`.
        device, dtype: Of the weights: those of the state, float32 or wider.

    Raises:
        InvalidShape: Weights of another shape.
        InvalidWeights: Weights off the simplex at some pixel, which the message names.
        InvalidSchedule: A level out of range; x_0 clipping; unequal levels of a rule that mixes
            predictions then (CPS).
        ZeroVariance: A pixel mixes levels of 0 with others under "error".
    """
    level = rule.levels.check(levels)
    count, steps = len(level), len(rule.timesteps)
    if rule.clip_range is not None:
        raise InvalidSchedule("weights per pixel need a step without x_0 clipping")
    mixes = isinstance(rule, MixingRule) and rule.mixes_unless_told
    if mixes and bool((level != level[0]).any()):
        raise InvalidSchedule(
            f"{rule.levels.name} is {rule.levels.meaning}, of which unequal levels mix predictions,"
            f" and weights per pixel fuse steps; give all objectives one level, got "
            f"{level.tolist()}"
        )
    c = None if rates is None else as_host_float64(rates, "rates")
    check_policy(zero_variance, c, count)
    terms = rule.step(level)
    rate = terms.rate.expand(steps, 1, count)[:, 0]
    made: dict[int, Tensor] = {}  # by id: many steps share their weights
    for given in weights:
        if id(given) not in made:
            made[id(given)] = _per_pixel(given, count, shape, extrapolate)
    per_step = [made[id(given)] for given in weights]
    if zero_variance == "error":
        _check_limits(rate == 0, per_step)
    influence = {key: (value != 0).flatten(1).any(1) for key, value in made.items()}
    on_device = {id(value): value.to(device=device, dtype=dtype) for value in made.values()}
    return PixelTable(
        x_scale=terms.x_scale.expand(steps, 1, count)[:, 0],
        output_scale=terms.output_scale.expand(steps, 1, count)[:, 0],
        rate=rate,
        unit=terms.unit.expand(steps, 1, 1)[:, 0, 0],
        weights=[on_device[id(value)] for value in per_step],
        influence=torch.stack([influence[id(given)] for given in weights]),
        zero_variance=zero_variance,
        rates=c,
        extrapolate=extrapolate,
    )


def _per_pixel(weights: WeightsLike, count: int, shape: torch.Size, extrapolate: bool) -> Tensor:
    """Return (M, B or 1, *S) float64 on the host, checked."""
    ndim = len(shape)
    if not _is_per_pixel(weights, ndim):
        rows = preference_weights(weights, count, shape[0], extrapolate=extrapolate)
        return rows.t()[(...,) + (None,) * (ndim - 1)]
    values = as_host_float64(weights, "weights")  # type: ignore[arg-type]
    full = (shape[0], count, *shape[1:])
    fits = values.shape[1] == count and all(
        n in (1, want) for n, want in zip(values.shape, full, strict=True)
    )
    if not fits:
        raise InvalidShape(
            f"weights have shape {tuple(values.shape)}, expected (B, M, *S) = {full}, or 1 for "
            "axes along which they are alike"
        )
    return normalise_weights(values, axis=1, extrapolate=extrapolate).movedim(1, 0)


def _check_limits(zero: Tensor, weights: Sequence[Tensor]) -> None:
    """Raise `ZeroVariance` where a pixel mixes rates of 0, (T, M), with others."""
    for k, (row, w) in enumerate(zip(zero, weights, strict=True)):
        if bool(row.any() and not row.all()):
            vanishing = row.view(-1, *(1,) * (w.ndim - 1))
            if bool(has_no_limit(vanishing, w, axis=0, common_factor=True).any()):
                raise ZeroVariance(
                    f"step {k} has zero and positive variance at the same pixel, which has no "
                    f"unique limit; use levels all 0 or all positive, or zero_variance='dominate' "
                    f"or 'ratio'"
                )


class PixelGeneration:
    """Steps of Algorithm 1 with weights per pixel.

    Args:
        predict: `f(x, k)` with x (B, *S) gives M outputs (B, *S), None for an objective without
            influence at step k.
        x_T: (B, *S), latent units.
        table: The T steps.
        noise: Source of z, which is asked at steps that add noise.
        backend: Backend of the fused step.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, int], Sequence[Tensor | None]],
        x_T: Tensor,
        table: PixelTable,
        noise: NoiseSource,
        backend: Backend = "auto",
    ) -> None:
        self._predict, self._table, self._noise, self._backend = predict, table, noise, backend
        self._x = x_T

    @property
    def x(self) -> Tensor:
        """The state, (B, *S) in latent units."""
        return self._x

    def step(self, k: int) -> None:
        """Do step k: predict, fuse, add noise."""
        outputs = self._predict(self._x, k)
        noise = self._noise.step(k, like=self._x) if self._table.adds_noise(k) else StepNoise()
        self._x = self._table.step(k, self._x, outputs, noise, self._backend)
