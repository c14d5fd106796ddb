# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of Eq. 7 elementwise: one launch, every input read once.

Arithmetic is in the dtype of the coefficients, in the order of `_eager.py`, and must not be
contracted (`enable_fp_fusion=False`), so the bits are those of eager. `_triton_tile` says what a
program reads and writes.
"""

import triton
import triton.language as tl

from msdda_fast.kernels.fused_step._triton_tile import noise_of, positions, read, write

__all__ = ["moments_step"]


@triton.jit
def _divide(numerator, denominator):
    if numerator.dtype == tl.float64:
        return numerator / denominator
    else:
        return tl.div_rn(numerator, denominator)  # `/` is 2 ulp off in float32


@triton.jit
def _root(value):
    if value.dtype == tl.float64:
        return tl.sqrt(value)
    else:
        return tl.sqrt_rn(value)


@triton.jit
def _table(
    pointer, samples, m, at, channels, pixels, PIXELWISE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Numbers of objective m per position (4-tuple); a scalar four times where they repeat."""
    entry = m * tl.cast(samples, tl.int64) + tl.where(samples == 1, 0, at[0])
    if PIXELWISE:
        start = pointer + entry * (tl.cast(channels, tl.int64) * pixels)
        return read(start, at, channels, channels, pixels, 0, BLOCK, pointer.dtype.element_ty)
    else:
        value = tl.load(pointer + entry)
        return value, value, value, value


@triton.jit
def _least(least, variances, weights):
    result = ()
    for i in tl.static_range(4):
        candidate = tl.where(weights[i] != 0, variances[i], float("inf"))
        result = result + (tl.where(candidate < least[i], candidate, least[i]),)
    return result


@triton.jit
def _scaled(least, variances, weights):
    """w_i r_i with r_i = least / variance: 1 for the least itself, also where both are zero."""
    result = ()
    for i in tl.static_range(4):
        ratio = tl.where(variances[i] == least[i], 1.0, _divide(least[i], variances[i]))
        result = result + (tl.where(weights[i] != 0, weights[i] * ratio, 0.0),)
    return result


@triton.jit
def _add_each(totals, coefficients, values):
    result = ()
    for i in tl.static_range(4):
        safe = tl.where(coefficients[i] != 0, values[i], 0.0)
        result = result + (totals[i] + coefficients[i] * safe,)
    return result


@triton.jit
def _accumulate(
    totals, precision, scaled, mean, at, channels, pixels,
    LAYOUT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    mu = read(mean, at, channels, channels, pixels, LAYOUT, BLOCK, WIDE)
    sums = ()
    for i in tl.static_range(4):
        sums = sums + (precision[i] + scaled[i],)
    return _add_each(totals, scaled, mu), sums


@triton.jit
def _quotients(numerators, denominators):
    result = ()
    for i in tl.static_range(4):
        result = result + (_divide(numerators[i], denominators[i]),)
    return result


@triton.jit(do_not_specialize=["step", "batch", "tiles", "variance_samples", "weight_samples"])
def moments_step(
    out,  # (B, *S)
    means,  # M pointers (B, *S), or one pointer (M, B, *S) when STACKED
    variances, weights,  # (M, 1 | B), or row-major (M, 1 | B, *S) when VARIANCES, WEIGHTS
    mean, variance,  # (B, *S) row-major | None
    noise, seeds, step,  # as in linear_step
    batch, channels, pixels, tiles,
    variance_samples, weight_samples,  # 1 | B
    M: tl.constexpr,
    STACKED: tl.constexpr,
    STEP_POINTER: tl.constexpr, NOISE_TABLE: tl.constexpr,
    VARIANCES: tl.constexpr, WEIGHTS: tl.constexpr,  # whether they are given per pixel
    OUT: tl.constexpr, MEANS: tl.constexpr, NOISE: tl.constexpr,  # layouts
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Eq. 7 elementwise and noise; `_eager.run_moments` is its definition."""
    wide: tl.constexpr = weights.dtype.element_ty
    at = positions(channels, pixels, tiles, BLOCK)
    sample, size = at[0], tl.cast(channels, tl.int64) * pixels
    start, all_samples = sample * size, batch * size
    zero = tl.zeros((BLOCK,), wide)
    least = (zero + float("inf"), zero + float("inf"), zero + float("inf"), zero + float("inf"))
    precision = (zero, zero, zero, zero)
    totals = (zero, zero, zero, zero)
    # the numbers are read twice: where they are few from the cache, unrolled from registers
    if STACKED:
        for m in range(M):
            v = _table(variances, variance_samples, m, at, channels, pixels, VARIANCES, BLOCK)
            w = _table(weights, weight_samples, m, at, channels, pixels, WEIGHTS, BLOCK)
            least = _least(least, v, w)
        for m in range(M):
            v = _table(variances, variance_samples, m, at, channels, pixels, VARIANCES, BLOCK)
            w = _table(weights, weight_samples, m, at, channels, pixels, WEIGHTS, BLOCK)
            scaled = _scaled(least, v, w)
            mu = means + m * all_samples + start
            totals, precision = _accumulate(
                totals, precision, scaled, mu, at, channels, pixels, MEANS, BLOCK, wide
            )
    else:
        for m in tl.static_range(M):
            v = _table(variances, variance_samples, m, at, channels, pixels, VARIANCES, BLOCK)
            w = _table(weights, weight_samples, m, at, channels, pixels, WEIGHTS, BLOCK)
            least = _least(least, v, w)
        for m in tl.static_range(M):
            v = _table(variances, variance_samples, m, at, channels, pixels, VARIANCES, BLOCK)
            w = _table(weights, weight_samples, m, at, channels, pixels, WEIGHTS, BLOCK)
            scaled = _scaled(least, v, w)
            totals, precision = _accumulate(
                totals,
                precision,
                scaled,
                means[m] + start,
                at,
                channels,
                pixels,
                MEANS,
                BLOCK,
                wide,
            )
    mu_w = _quotients(totals, precision)
    var_w = _quotients(least, precision)
    if mean is not None:
        write(mean + start, at, mu_w, channels, pixels, 0, BLOCK)
    if variance is not None:
        write(variance + start, at, var_w, channels, pixels, 0, BLOCK)
    if noise is not None or seeds is not None:
        k = tl.load(step) if STEP_POINTER else step.to(tl.int64)
        given = None if noise is None else noise + k * NOISE_TABLE * all_samples + start
        z = noise_of(given, seeds, sample, k, at, channels, channels, pixels, NOISE, BLOCK, wide)
        std = (_root(var_w[0]), _root(var_w[1]), _root(var_w[2]), _root(var_w[3]))
        mu_w = _add_each(mu_w, std, z)
    write(out + start, at, mu_w, channels, pixels, OUT, BLOCK)
