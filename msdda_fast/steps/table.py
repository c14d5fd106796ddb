# SPDX-License-Identifier: Apache-2.0
r"""From a sampler's rule, noise levels and preference weights to the coefficients of fused steps.

A rule gives each objective's Gaussian N(A_i x_t + B_i m_i, tau_i^2), with tau_i = rate_i u; see
`rules`. With the guided output `m_i = u_i + g_i (c_i - u_i)`, Eq. 7 becomes

    share_i = (w_i / rate_i^2) / sum_j w_j / rate_j^2,     rate_w^2 = 1 / sum_j w_j / rate_j^2,
    x_prev = (sum_i share_i A_i) x_t + sum_i share_i B_i m_i + rate_w u z,

which is defined also where u = 0. With `fusion="eps"` the predictions are mixed instead,
and one step is taken at the level of the fused rate; see `coefficient_table`. Everything is float64
on the host and is cast once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, InvalidShape
from msdda_fast.steps.coefficients import CoefficientTable, check_dtype
from msdda_fast.steps.mixing import check_fused_rate, mixing_rule, no_mixing
from msdda_fast.steps.pixel_table import check_pixels, pixel_table
from msdda_fast.steps.pixels import PixelWeights
from msdda_fast.steps.rules import Rule
from msdda_fast.steps.schedulers import levels_of, scheduler_rule
from msdda_fast.steps.shares import eps_mixture, fusion_shares
from msdda_fast.steps.strength import folding
from msdda_fast.steps.table_rows import step_rows
from msdda_fast.weight_ranges import alternatives, has_ranges
from msdda_fast.weights import as_host_float64, preference_schedule

if TYPE_CHECKING:
    from msdda_fast.levels import NoiseLevels, TimestepRange
    from msdda_fast.types import Fusion, Scheduler, WeightSchedule, ZeroVariancePolicy

__all__ = ["coefficient_table", "rule_table"]


def coefficient_table(
    scheduler: Scheduler,
    num_steps: int | None,
    *,
    etas: Sequence[float] | Tensor | None = None,
    levels: NoiseLevels | None = None,
    weights: Mapping[Any, Any] | Sequence[Any] | Tensor | None,
    guidance_scale: float | Sequence[float] | Tensor = 1.0,
    zero_variance: ZeroVariancePolicy = "error",
    rates: Sequence[float] | Tensor | None = None,
    extrapolate: bool = False,
    fusion: Fusion | None = None,
    strength: float | Sequence[Any] | Tensor | None = None,
    ranges: Sequence[TimestepRange | None] | None = None,
    pixels: PixelWeights | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> CoefficientTable:
    """Build the coefficients of Algorithm 1 (Eq. 7) over the steps of a scheduler.

    Schedulers of diffusers that have a rule (`steps.schedulers.RULES`): DDIM, DDPM (fixed_small),
    EulerAncestralDiscrete, LCM, TCD, FlowMatchEulerDiscrete, FlowMatchLCM and LTXEulerAncestralRF.
    DDIM, DDPM and LCM may clip x_0 (`clip_sample`). The scheduler is copied, never changed. As in
    diffusers, DDIM steps from t to `t - num_train // num_steps`, also where that is not the next
    timestep. Refused is what diffusers' "trailing" spacing makes of some T (61 of 1000): a surplus
    timestep -1.

    Args:
        scheduler: One of them; anything of another library with the config and `alphas_cumprod` of
            DDIM is taken for it.
        num_steps: T, in [1, num_train_timesteps]; None: as the scheduler's timesteps are set, by
            `set_timesteps(..., mu=...)` or otherwise.
        etas: (M,), the noise level of each objective, in the scheduler's own kind: DDIM's eta in
            [0, 1], also of Euler ancestral, LTX and FlowMatchEuler; TCD's gamma in [0, 1].
        levels: Instead of etas: the same, or the noise that flow models were trained with, such as
            `[FlowSDE(0.7), FlowSDE(0.4)]`, for FlowMatchEuler. With neither: what the scheduler
            does by itself, which is an ODE for FlowMatchEuler; DDIM and TCD need levels.
        weights: Preferences (M,), (B, M) or (T, B, M), rows on the simplex; None is uniform. Or a
            mapping from ranges of timesteps to the first two, such as `{(500, 999): [1, 0], (0,
            499): [.5, .5]}`, both ends included. Or (B, M, *S), a preference of every pixel, each
            axis of S that of the latents or 1, and two of them or more.
        guidance_scale: g, a number, (M,) or (B, M); 1 is no guidance.
        zero_variance: What to do when a sample mixes levels of 0 with others; see `fusion_shares`.
        rates: (M,) > 0, the relative rates c_i of `zero_variance="ratio"`.
        extrapolate: Accept negative weights while the total precision stays positive.
        fusion: "posterior" is Eq. 7. "eps" is one step at the fused rate, rate_w, on the mixed
            predictions,

                epshat_w = sum_i what_i epshat_i,
                what_i = share_i B(level_i) / sum_j share_j B(level_j),

            where B(level) is what a step makes of a prediction of the noise. The two are the same
            where levels are equal. Where they differ, Eq. 7 leaves a step with less noise than
            there should be, by O(1/T), and for CPS by more; "eps" does not. None: "eps" for CPS
            with unequal levels, else "posterior".
        strength: How strongly each objective acts, s >= 0: a number, (M,) or (B, M); 1 is Eq. 7, 0
            the base, 2 twice as far from it. See `steps.strength`.
        ranges: The timesteps (first, last) in which each objective acts, the base elsewhere; None:
            in all. With either of the two the table has one more objective, the base, at the end.
        pixels: Instead of weights (B, M, *S): the same in parts, beside `weights` of the steps.
        device: Where `rows` and `timesteps` go; the CPU by default.
        dtype: Of `rows`: float32, or float64 for a float64 state.

    Returns:
        The table; B is 1 when neither weights nor guidance have a batch axis.

    Raises:
        InvalidSchedule: A level, guidance scale, number of steps or scheduler setting is outside
            the range above, or not one an affine kernel can express; levels of another rule's kind;
            sigmas of a flow outside [0, 1]; learned variances; another fusion than those; or "eps"
            with x_0 clipping, where predictions cannot be mixed.
        InvalidWeights: Weights off the simplex, or a total precision that is not positive; with
            "eps" also extrapolated ones that leave the range of levels or predictions that cancel.
        InvalidShape: `weights`, `etas`, `levels`, `rates` or `guidance_scale` of another shape, or
            a `dtype` that is not floating-point.
        ZeroVariance: A sample mixes levels of 0 with others under `zero_variance="error"`.
        ValueError: Both `etas` and `levels`.
    """
    count = None
    if etas is None and levels is None and weights is not None:
        shape = _shape_of(weights)
        count = shape[1] if len(shape) > 3 else shape[-1]
    read = levels_of(scheduler, etas, levels, count)
    return rule_table(
        scheduler_rule(scheduler, num_steps, read.noise),
        levels=read.values,
        weights=weights,
        guidance_scale=guidance_scale,
        zero_variance=zero_variance,
        rates=rates,
        extrapolate=extrapolate,
        fusion=fusion,
        strength=strength,
        ranges=ranges,
        pixels=pixels,
        device=device,
        dtype=dtype,
    )


def rule_table(
    rule: Rule,
    *,
    levels: Sequence[float] | Tensor,
    weights: WeightSchedule,
    guidance_scale: float | Sequence[float] | Tensor = 1.0,
    batch_size: int | None = None,
    zero_variance: ZeroVariancePolicy = "error",
    rates: Sequence[float] | Tensor | None = None,
    extrapolate: bool = False,
    fusion: Fusion | None = None,
    strength: float | Sequence[Any] | Tensor | None = None,
    ranges: Sequence[TimestepRange | None] | None = None,
    pixels: PixelWeights | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> CoefficientTable:
    """Build the coefficients of T fused steps of any sampler (Eq. 7).

    Args:
        rule: The sampler on its T steps.
        levels: (M,), the noise level of each objective, in the range and meaning of the rule.
        weights, pixels: As in `coefficient_table`; with `batch_size` weights are also a callable
            from the step index k = 0..T-1 to (M,) or (B, M).
        batch_size: B; None: that of `weights` and `guidance_scale`.
        guidance_scale, zero_variance, rates, extrapolate: As in `coefficient_table`.
        strength, ranges, device, dtype: As in `coefficient_table`; strength also (T, B, M).
        fusion: As there; "eps" needs a `MixingRule`.

    Raises:
        InvalidSchedule, InvalidWeights, InvalidShape, ZeroVariance: As `coefficient_table`, with
            the levels of the rule in place of etas.
    """
    check_dtype(dtype)
    level = rule.levels.check(levels)
    count, steps = len(level), len(rule.timesteps)
    guidance = _guidance(guidance_scale, count)
    fold = folding(strength, ranges, rule.timesteps, count)
    if fold is not None and rule.clip_range is not None:
        raise InvalidSchedule(
            "strength and ranges of timesteps mix outputs with the base's, of which a step with "
            "x_0 clipping (clip_sample=True) is no affine function"
        )
    if isinstance(weights, Tensor) and weights.ndim > 3:
        pixels, weights = PixelWeights.of(weights), None
    if pixels is not None and batch_size is None:
        batch_size = pixels.shape[0]
    own = None if fold is None else fold.strength[0]
    batch = _batch_size(weights, guidance, own, batch_size)
    weight = preference_schedule(
        weights, count, batch, steps, extrapolate=extrapolate, timesteps=rule.timesteps
    )
    schedule = weight
    if pixels is not None:
        check_pixels(pixels, schedule, batch)
        weight = pixels.mean(schedule)
    mixing = mixing_rule(fusion, rule, level)
    if mixing is not None and pixels is not None:
        no_mixing(level)
        mixing = None
    terms = rule.step(level)
    share, rate = fusion_shares(weight, terms.rate, zero_variance=zero_variance, rates=rates)
    if mixing is not None:
        check_fused_rate(rate, rule)
        share = eps_mixture(share, mixing.eps_scale(level))
        terms = mixing.step_at(rate[..., None])
    std = rate * terms.unit[..., 0]

    rows = step_rows(share, std, terms, guidance, fold)
    table_of_pixels = None
    if pixels is not None:
        c = None if rates is None else as_host_float64(rates, "rates")
        table_of_pixels = pixel_table(pixels, schedule, weight, terms, guidance, fold, c)
        table_of_pixels = table_of_pixels.to(device, dtype)
    needs_uncond = bool(((share != 0) & (guidance != 1)).any())
    influence = (share != 0).any(1)
    reads = torch.ones_like(influence)
    if fold is not None:
        influence, reads = fold.influence(share), fold.reads()
        share = fold.columns(share)
    narrow = min(dtype, torch.float32, key=lambda kind: torch.finfo(kind).max)  # of most states
    for values in [rows] if table_of_pixels is None else [rows, table_of_pixels.means]:
        if not bool((values.abs() <= torch.finfo(narrow).max).all()):  # NaN fails too
            raise InvalidSchedule(
                f"the coefficients of these steps do not fit {narrow}: {values.abs().max():g} is "
                f"the largest, with guidance_scale {guidance.abs().max():g} and "
                f"{rule.levels.name} {level.tolist()}"
            )
    timesteps = rule.timesteps.to(dtype) if rule.timesteps.is_floating_point() else rule.timesteps
    scale = rule.input_scale
    return CoefficientTable(
        rows=rows.to(device=device, dtype=dtype),
        timesteps=timesteps.to(device=device),
        input_scale=None if scale is None else scale.to(device=device, dtype=dtype),
        num_objectives=share.shape[-1],
        clip_range=rule.clip_range,
        share=share,
        std=std,
        needs_uncond=needs_uncond,
        influence=influence,
        reads=reads,
        has_base=fold is not None,
        pixels=table_of_pixels,
    )


def _guidance(guidance_scale: float | Sequence[float] | Tensor, count: int) -> Tensor:
    """Return g as (M,) or (B, M) float64."""
    values = as_host_float64(guidance_scale, "guidance_scale")
    if values.ndim > 2 or (values.ndim and values.shape[-1] != count):
        raise InvalidShape(
            f"guidance_scale has shape {tuple(values.shape)}, expected (), (M,) or (B, M) "
            f"with M = {count}"
        )
    if not values.isfinite().all():
        raise InvalidSchedule(f"guidance_scale must be finite, got {values.tolist()}")
    return values.expand(count) if values.ndim == 0 else values


def _batch_size(
    weights: WeightSchedule, guidance: Tensor, strength: Tensor | None, given: int | None
) -> int:
    """B as `given`, or as the weights, guidance and strength (B, M) say."""
    sizes = {"guidance_scale": tuple(guidance.shape)}
    if strength is not None:
        sizes["strength"] = tuple(strength.shape)
    if given is None and weights is not None:
        sizes["weights"] = _shape_of(weights)
    found = {shape[-2] for shape in sizes.values() if len(shape) > 1} - {1}
    if given is not None and not found <= {given}:
        fits = ((), (1,), (given,))
        name, shape = next(one for one in sizes.items() if one[1][-2:-1] not in fits)
        raise InvalidShape(f"{name} has shape {shape}, expected B = {given}")
    if len(found) > 1:
        raise InvalidShape(f"{' and '.join(sizes)} disagree on the batch size: {sizes}")
    if given is not None:
        return given
    return found.pop() if found else 1


def _shape_of(weights: Any) -> tuple[int, ...]:  # noqa: ANN401 - `WeightsLike`, or by ranges
    """The shape of preferences; of those by ranges, the longest."""
    forms = alternatives(weights) if has_ranges(weights) else [weights]
    return max((tuple(as_host_float64(form, "weights").shape) for form in forms), key=len)
