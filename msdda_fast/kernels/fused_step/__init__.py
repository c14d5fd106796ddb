# SPDX-License-Identifier: Apache-2.0
r"""One reverse step of several objectives, from Gaussian moments or from raw network outputs.

`fast_fuse_step` and `fused_ddim_step` check their inputs, then call a raw function of the chosen
backend. The engine resolves a backend once and binds its raw functions; `kernels.raw` has them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, InvalidShape
from msdda_fast.kernels.fused_step._inputs import (
    by_objective,
    check_alike,
    check_out,
    check_pixels,
    check_tensor,
    compute_dtype,
    pick,
    randomness,
)
from msdda_fast.kernels.fused_step._memory import finish, has_address, readable
from msdda_fast.kernels.fused_step._pixelwise import run_pixelwise
from msdda_fast.kernels.fused_step._posteriors import (
    as_numbers,
    fused_coefficients,
    prepare,
    with_all_axes,
)
from msdda_fast.steps.coefficients import Layout, StepCoefficients
from msdda_fast.tracing import values_are_readable
from msdda_fast.types import GeneratorLike, SeedsLike, ZeroVariancePolicy

__all__ = ["FusedStep", "fast_fuse_step", "fused_ddim_step"]


class FusedStep(NamedTuple):
    """A fused step and the Gaussian it was drawn from.

    Attributes:
        prev_sample: x_{t-1}, (B, *S), latent units.
        mean: mu_w, (B, *S), latent units, float32 or wider.
        variance: sigma_w^2, latent units squared, float32 or wider, in the broadcast shape of
            `variances` and `weights` without its objective axis: (), (B,) or (B, *S).
    """

    prev_sample: Tensor
    mean: Tensor
    variance: Tensor


def fast_fuse_step(
    means: Tensor | Sequence[Tensor],
    variances: Tensor | Sequence[object] | float,
    weights: Tensor | Sequence[object],
    noise: Tensor | None = None,
    seeds: SeedsLike | None = None,
    step: int | Tensor = 0,
    generator: GeneratorLike | None = None,
    return_moments: bool = False,
    backend: str = "auto",
    out: Tensor | None = None,
    *,
    zero_variance: ZeroVariancePolicy = "error",
    rates: Sequence[float] | Tensor | None = None,
    extrapolate: bool = False,
) -> Tensor | FusedStep:
    r"""Fuse M Gaussian posteriors into their weighted product and draw from it (Theorem 1, Eq. 7).

        P = sum_j w_j / sigma_j^2,   share_i = (w_i / sigma_i^2) / P,   sigma_w^2 = 1 / P,
        x_prev = sum_i share_i mu_i + sigma_w z.

    The objective axis comes first everywhere in this function (elsewhere weights are (B, M)). A
    weight of 0 masks its objective for that sample, NaN and Inf included. Values of variances and
    weights are checked when they are Python numbers or CPU tensors, outside of `torch.compile` and
    FakeTensor tracing; tensors elsewhere get shape, dtype and device checks only, "error" then acts
    as "dominate".

    Args:
        means: mu_i, (M, B, *S) or M tensors (B, *S), latent units.
        variances: sigma_i^2 >= 0, latent units squared: a number, (M,), (M, B) or (M, B, *S).
        weights: Preferences w, no unit: (M,), (M, B) or (M, B, *S), sum 1 over the first axis
            within 1e-3, renormalised in float64.
        noise: z, (B, *S), no unit.
        seeds: Instead of `noise`: one 64-bit seed per sample, for `counter_noise` at `step`.
        step: Step index k in sampling order in [0, 2^32), an int or a 0-d int64 tensor; counts
            the noise of `seeds` only.
        generator: Instead: `torch.randn` with this generator, or one generator per sample. With
            none of the three: torch's default generator.
        return_moments: Return a `FusedStep` with the fused mean and variance.
        backend: "auto", "eager" (differentiates), "native" or "triton".
        out: (B, *S), any float dtype: the result goes here; it may overlap the inputs.
        zero_variance: What to do where a variance of 0 meets other active objectives: "error";
            "dominate": those with zero variance decide, sharing by weight (the literal limit);
            "ratio": likewise, sharing by w_i / c_i^2.
        rates: (M,) > 0, the rates c_i of "ratio", no unit.
        extrapolate: Accept negative weights while every total precision stays positive.

    Returns:
        x_prev (B, *S) in latent units, in the dtype of `means` (or `out`); or a `FusedStep`.

    Raises:
        InvalidShape: A wrong shape (both are given), device or dtype; memory that was freed, or in
            `out` shared.
        InvalidWeights: Weights off the simplex or not finite; no positive precision.
        ZeroVariance: See `zero_variance`.
        InvalidSchedule: A policy or rates outside of the above.
        ValueError: A variance that is negative or not finite; more than one source of noise; a
            seed or step outside of its range.
        BackendUnavailable: The backend cannot run here; an input requires grad, or has a tangent,
            without "eager".
    """
    means = by_objective(means, "means")
    if not means:
        raise InvalidShape("means are empty: expected M >= 1 tensors (B, *S)")
    first = means[0]
    check_tensor(first, "means[0]")
    for m, mean in enumerate(means):
        check_alike(mean, f"means[{m}]", first.shape, first.device, first.dtype)
    check_alike(first, "means", first.shape, first.device)
    if first.ndim == 0:
        raise InvalidShape("means have shape (M,), expected (M, B, *S)")
    count = len(means)
    var, weight = as_numbers(variances, "variances"), as_numbers(weights, "weights")
    kept_axes = max(var.ndim, weight.ndim, 1) - 1
    var = with_all_axes(var, "variances", count, first)
    weight = with_all_axes(weight, "weights", count, first)
    z = randomness(first, noise, seeds, step, generator)
    if addresses := has_address(first):
        means = [readable(mean, f"means[{m}]") for m, mean in enumerate(means)]
        var, weight = readable(var, "variances"), readable(weight, "weights")
        z = z.readable()
    inputs = [*means, var, weight, z.noise]
    target = check_out(out, first, inputs, addresses=addresses)
    raw = pick(backend, inputs if out is None else [*inputs, out])
    var, weight = prepare(
        var,
        weight,
        first.device,
        zero_variance=zero_variance,
        rates=rates,
        extrapolate=extrapolate,
    )
    if all(n == 1 for t in (var, weight) for n in t.shape[2:]):
        share, fused_variance = fused_coefficients(var, weight)
        dtype = compute_dtype(first)
        mean_row = torch.nn.functional.pad(share.reshape(count, -1).t(), (count + 1, 1))
        branches = [mean.unsqueeze(0) for mean in means]
        std = fused_variance.sqrt().reshape(-1)
        if not return_moments:
            row = torch.cat([mean_row[:, :-1], std[:, None]], dim=1).to(dtype)
            raw.run(target, None, branches, row, **z._asdict())
            return finish(target, out)
        mu = torch.empty_like(first, dtype=dtype, requires_grad=False)
        raw.run(mu, None, branches, mean_row.to(dtype))
        row = torch.stack([torch.ones_like(std), std], dim=1).to(dtype)
        raw.run(target, mu, [], row, **z._asdict())
    else:
        dtype = compute_dtype(first, var)
        var, weight = var.to(dtype), weight.to(dtype)
        if not return_moments:
            raw.run_moments(target, means, var, weight, **z._asdict())
            return finish(target, out)
        mu = torch.empty_like(first, dtype=dtype, requires_grad=False)
        fused_variance = torch.empty_like(mu)
        raw.run_moments(target, means, var, weight, mean=mu, variance=fused_variance, **z._asdict())
    variance_shape = fused_variance.shape[:kept_axes]
    return FusedStep(finish(target, out), mu, fused_variance.to(dtype).reshape(variance_shape))


def fused_ddim_step(
    x_t: Tensor,
    outputs: Tensor | Sequence[Tensor | None],
    coefficients: StepCoefficients,
    *,
    noise: Tensor | None = None,
    seeds: SeedsLike | None = None,
    step: int | Tensor = 0,
    generator: GeneratorLike | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    r"""Guidance, DDIM posteriors, fusion (Eq. 7) and noise in one pass over raw network outputs.

        x_prev = x_scale x_t + sum_m (uncond_m u_m + cond_m c_m) + noise_scale z,

    plus the clipped x_0 terms of `StepCoefficients` when the scheduler clips. A coefficient of 0
    masks its input, NaN and Inf included.

    Args:
        x_t: (B, *S), latent units.
        outputs: What the networks predict at x_t, (M, K, B, *S), or M tensors (K, B, *S), in the
            unit of the scheduler's prediction type. K = 2: (uncond, cond); K = 1: cond only, for
            steps without guidance. None for an objective whose coefficients are all 0.
        coefficients: `table[k]` of a `coefficient_table`; B = 1 there serves every sample. Those
            with weights of every pixel fuse them elementwise.
        noise: z, (B, *S), no unit.
        seeds: Instead of `noise`: one 64-bit seed per sample, for `counter_noise` at `step`.
        step: Step index k in sampling order in [0, 2^32), an int or a 0-d int64 tensor.
        generator: Instead: `torch.randn` with this generator, or one generator per sample. With
            none of the three: torch's default generator.
        backend: "auto", "eager" (differentiates), "native" or "triton".
        out: (B, *S), any float dtype: the result goes here; it may be `x_t` or overlap the inputs.

    Returns:
        x_prev (B, *S) in latent units, in the dtype of `x_t` (or `out`).

    Raises:
        InvalidShape: A wrong shape (both are given), device or dtype; memory that was freed, or in
            `out` shared; an output that is missing although a coefficient of it is not 0 (seen for
            coefficients on the CPU only).
        InvalidSchedule: A clip range that is not positive and finite.
        ValueError: More than one source of noise; a seed or step outside of its range.
        BackendUnavailable: The backend cannot run here; an input requires grad, or has a tangent,
            without "eager".
    """
    check_tensor(x_t, "x_t")
    count, shape = coefficients.num_objectives, x_t.shape
    check_alike(x_t, "x_t", shape, x_t.device)
    branches = by_objective(outputs, "outputs")
    if len(branches) != count or x_t.ndim == 0:
        raise InvalidShape(
            f"got {len(branches)} outputs and x_t {tuple(shape)}, expected {count} outputs "
            "(K, B, *S) for x_t (B, *S)"
        )
    row = coefficients.row
    width = coefficients.layout.width
    if row.shape not in ((1, width), (shape[0], width)):
        raise InvalidShape(
            f"coefficients have shape {tuple(row.shape)}, expected ({shape[0]}, {width}) or "
            f"(1, {width})"
        )
    check_alike(row, "coefficients", row.shape, x_t.device)
    if row.dtype != torch.float64 and x_t.dtype == torch.float64:
        raise InvalidShape(
            f"coefficients are {row.dtype} for x_t in float64; build the table with "
            "dtype=torch.float64"
        )
    clip_range = coefficients.clip_range
    if clip_range is not None and not 0 < clip_range < float("inf"):
        raise InvalidSchedule(f"clip_range must be positive and finite, got {clip_range}")
    if row.dtype != (dtype := compute_dtype(x_t)):
        row = row.to(dtype)
    output_dtype: torch.dtype | None = None
    for m, output in enumerate(branches):
        if output is not None:
            check_tensor(output, f"outputs[{m}]")
            branch_count = output.shape[0] if output.ndim == x_t.ndim + 1 else 2
            expected = (branch_count if branch_count in (1, 2) else 2, *shape)
            check_alike(output, f"outputs[{m}]", expected, x_t.device, output_dtype)
            output_dtype = output.dtype
        if output is None or output.shape[0] == 1:
            _check_unused(row, coefficients.layout, m, whole=output is None)
    if output_dtype == torch.float64 and x_t.dtype != torch.float64:
        raise InvalidShape(f"outputs are float64, wider than x_t in {x_t.dtype}; make x_t float64")
    z = randomness(x_t, noise, seeds, step, generator)
    if addresses := has_address(x_t):
        x_t, row, z = readable(x_t, "x_t"), readable(row, "coefficients"), z.readable()
        branches = [
            output if output is None else readable(output, f"outputs[{m}]")
            for m, output in enumerate(branches)
        ]
    inputs = [x_t, *branches, row, z.noise]
    target = check_out(out, x_t, inputs, addresses=addresses)
    raw = pick(backend, inputs if out is None else [*inputs, out])
    if (pixels := coefficients.pixels) is not None:
        rows, variances, weights = (values.to(dtype) for values in pixels)
        check_pixels(weights, x_t)
        means = [torch.empty_like(x_t, dtype=dtype, requires_grad=False) for _ in rows]
        run_pixelwise(
            raw, target, x_t, branches, means, rows, variances, weights,
            clip_range=clip_range, **z._asdict(),
        )  # fmt: skip
        return finish(target, out)
    raw.run(target, x_t, branches, row, clip_range=clip_range, **z._asdict())
    return finish(target, out)


def _check_unused(row: Tensor, layout: Layout, m: int, *, whole: bool) -> None:
    """Raise unless the coefficients of absent output `m` (all, or its uncond half) are 0."""
    if not values_are_readable(row):
        return
    if bool((row[:, layout.of_output(m, uncond_only=not whole)] != 0).any()):
        part = "is None" if whole else "has no uncond half (K = 1)"
        raise InvalidShape(f"outputs[{m}] {part}, but its coefficients are not 0")
