# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the fused step: one launch, every input read once, the result written once.

A program takes BLOCK positions of one sample. A position is a pixel of a block of four channels,
because one Philox call gives four normals; its values travel as a 4-tuple of tensors (BLOCK,).
Arithmetic is in the dtype of the coefficients, in the order of `_eager.py`, without contraction, so
the bits are those of eager.

Layouts: 0 row-major (channel, pixel); 1 channels last; 2 channels last with exactly four channels,
where the values of neighbouring positions follow each other and are read as one run.
"""

import triton
import triton.language as tl

from msdda_fast.kernels.counter_noise._triton import normals

__all__ = ["linear_step", "moments_step"]


@triton.jit
def _positions(channels, pixels, tiles, BLOCK: tl.constexpr):
    """Sample, first position, positions, their channel block and pixel."""
    program = tl.program_id(0)
    first = (program % tiles) * BLOCK
    q = first + tl.arange(0, BLOCK)
    block = q // pixels
    return (program // tiles).to(tl.int64), first, q, block, q % pixels


@triton.jit
def _offset(at, i: tl.constexpr, channels, pixels, LAYOUT: tl.constexpr):
    """Offset of channel 4 block + i in the sample, in 64 bits."""
    channel = (4 * at[3] + i).to(tl.int64)
    if LAYOUT == 0:
        return channel * pixels + at[4]
    else:
        return at[4].to(tl.int64) * channels + channel


@triton.jit
def _run(at, limit, pixels, BLOCK: tl.constexpr):
    """Offsets and mask of a run of 4 BLOCK values: layout 2, where `limit` is 4 or 0."""
    run = 4 * at[1].to(tl.int64) + tl.arange(0, 4 * BLOCK)
    return run, run < limit * pixels.to(tl.int64)


@triton.jit
def _limit(active, channels):
    """How many channels to read: none unless `active`."""
    return tl.where(active, channels, 0)


@triton.jit
def _read(
    pointer, at, limit, channels, pixels,
    LAYOUT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The values of the positions as a 4-tuple; zeros, not read, from channel `limit` on."""
    if LAYOUT == 2:
        run, exists = _run(at, limit, pixels, BLOCK)
        values = tl.load(pointer + run, mask=exists, other=0.0).to(WIDE)
        even, odd = tl.split(tl.reshape(values, (BLOCK, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth
    else:
        values = ()
        for i in tl.static_range(4):
            exists = 4 * at[3] + i < limit
            offset = _offset(at, i, channels, pixels, LAYOUT)
            values = values + (tl.load(pointer + offset, mask=exists, other=0.0).to(WIDE),)
        return values


@triton.jit
def _round(value, TO: tl.constexpr):
    """Convert as torch does: from float64 to a half format by way of float32."""
    if value.dtype == tl.float64 and TO.primitive_bitwidth == 16:
        return value.to(tl.float32).to(TO)
    else:
        return value.to(TO)


@triton.jit
def _write(pointer, at, values, channels, pixels, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    to: tl.constexpr = pointer.dtype.element_ty
    if LAYOUT == 2:
        run, exists = _run(at, channels, pixels, BLOCK)
        halves = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
        tl.store(pointer + run, _round(tl.reshape(halves, (4 * BLOCK,)), to), mask=exists)
    else:
        for i in tl.static_range(4):
            exists = 4 * at[3] + i < channels
            offset = _offset(at, i, channels, pixels, LAYOUT)
            tl.store(pointer + offset, _round(values[i], to), mask=exists)


@triton.jit
def _add(totals, coefficient, values):
    """totals + coefficient * values; a coefficient of 0 masks its values, NaN and Inf included."""
    result = ()
    for i in tl.static_range(4):
        result = result + (totals[i] + coefficient * tl.where(coefficient != 0, values[i], 0.0),)
    return result


@triton.jit
def _add_clipped(totals, coefficient, values, RANGE: tl.constexpr):
    clipped = ()
    for i in tl.static_range(4):  # NaN stays NaN, as in torch.clamp
        low = tl.where(values[i] < -RANGE, -RANGE, values[i])
        clipped = clipped + (tl.where(low > RANGE, RANGE, low),)
    return _add(totals, coefficient, clipped)


@triton.jit
def _objective(
    totals, uncond, cond, x, row, m, at, channels, pixels,
    M: tl.constexpr, GUIDED: tl.constexpr, RANGE: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add what objective m contributes: its two outputs and, when clipped, its x_0 prediction."""
    x0 = row + 2 * M + 2  # clipped layout: x, uncond[M], cond[M], scale[M]
    x0_scale, x0_u, x0_c, u, u_values = 0.0, 0.0, 0.0, 0.0, totals
    c = tl.load(row + 1 + M + m)
    if RANGE is not None:
        x0_scale, x0_c = tl.load(x0 + 1 + 2 * M + m), tl.load(x0 + 1 + M + m)
    c_active = (c != 0) | ((x0_scale != 0) & (x0_c != 0))
    if GUIDED:
        u = tl.load(row + 1 + m)
        if RANGE is not None:
            x0_u = tl.load(x0 + 1 + m)
        u_active = (u != 0) | ((x0_scale != 0) & (x0_u != 0))
        limit = _limit(u_active, channels)
        u_values = _read(uncond, at, limit, channels, pixels, LAYOUT, BLOCK, WIDE)
        totals = _add(totals, u, u_values)
    limit = _limit(c_active, channels)
    c_values = _read(cond, at, limit, channels, pixels, LAYOUT, BLOCK, WIDE)
    totals = _add(totals, c, c_values)
    if RANGE is not None and x is not None:
        zero = tl.zeros((BLOCK,), WIDE)
        x_0 = _add((zero, zero, zero, zero), tl.load(x0), x)
        if GUIDED:
            x_0 = _add(x_0, x0_u, u_values)
        x_0 = _add(x_0, x0_c, c_values)
        totals = _add_clipped(totals, x0_scale, x_0, RANGE)
    return totals


@triton.jit
def _noise(
    noise, seeds, sample, k, at, limit, channels, pixels,
    NOISE_LAYOUT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """z of the positions: read, or drawn on stream 1 (STREAM_STEP)."""
    if seeds is None:
        return _read(noise, at, limit, channels, pixels, NOISE_LAYOUT, BLOCK, WIDE)
    else:
        drawn = normals(tl.load(seeds + sample), at[4].to(tl.uint32), at[3].to(tl.uint32), k, 1)
        return drawn[0].to(WIDE), drawn[1].to(WIDE), drawn[2].to(WIDE), drawn[3].to(WIDE)


@triton.jit(
    do_not_specialize=["step", "batch", "row_step", "row_sample", "noise_step", "copies", "tiles"]
)
def linear_step(
    out,  # (B, *S)
    x,  # (B, *S) | None
    outputs,  # M pointers (K, B, *S) | None, or one pointer (M, K, B, *S) when STACKED
    rows,  # coefficients, C of them from rows + step * row_step + sample * row_sample on
    noise,  # (B, *S) from noise + step * noise_step on | None
    seeds,  # (B,) int64 | None
    next_input,  # (copies, B, *S) | None
    step,  # int, or pointer to one int64 when STEP_POINTER
    batch, channels, pixels, tiles, row_step, row_sample, noise_step, copies,
    M: tl.constexpr,
    BRANCHES: tl.constexpr,  # K of each objective
    STACKED: tl.constexpr,
    STEP_POINTER: tl.constexpr,
    RANGE: tl.constexpr,  # clip range | None
    OUT: tl.constexpr, X: tl.constexpr, OUTPUTS: tl.constexpr, NOISE: tl.constexpr,
    NEXT: tl.constexpr,  # layouts
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One reverse step from raw network outputs; `_eager.run` is its definition."""
    wide: tl.constexpr = rows.dtype.element_ty
    at = _positions(channels, pixels, tiles, BLOCK)
    sample, size = at[0], channels.to(tl.int64) * pixels
    start, all_samples = sample * size, batch * size
    k = tl.load(step) if STEP_POINTER else step.to(tl.int64)
    row = rows + k * row_step + sample * row_sample
    zero = tl.zeros((BLOCK,), wide)
    totals = (zero, zero, zero, zero)
    x_values = None
    if x is not None:
        scale = tl.load(row)
        active = scale != 0
        if RANGE is not None:
            active = active | (tl.load(row + 2 * M + 2) != 0)
        x_values = _read(x + start, at, _limit(active, channels), channels, pixels, X, BLOCK, wide)
        totals = _add(totals, scale, x_values)
    if STACKED:
        for m in range(M):
            uncond = outputs + m * BRANCHES * all_samples + start
            totals = _objective(
                totals, uncond, uncond + (BRANCHES - 1) * all_samples, x_values, row, m, at,
                channels, pixels, M, BRANCHES == 2, RANGE, OUTPUTS, BLOCK, wide,
            )  # fmt: skip
    else:
        for m in tl.static_range(M):
            if outputs[m] is not None:
                uncond = outputs[m] + start
                totals = _objective(
                    totals, uncond, uncond + (BRANCHES[m] - 1) * all_samples, x_values, row, m, at,
                    channels, pixels, M, BRANCHES[m] == 2, RANGE, OUTPUTS, BLOCK, wide,
                )  # fmt: skip
    if noise is not None or seeds is not None:
        scale = tl.load(row + 2 * M + 1)
        given = None if noise is None else noise + k * noise_step + start
        limit = _limit(scale != 0, channels)
        z = _noise(given, seeds, sample, k, at, limit, channels, pixels, NOISE, BLOCK, wide)
        totals = _add(totals, scale, z)
    _write(out + start, at, totals, channels, pixels, OUT, BLOCK)
    if next_input is not None:
        stored = ()  # the copies are of `out`, so its rounding comes first
        for i in tl.static_range(4):
            stored = stored + (_round(totals[i], out.dtype.element_ty),)
        for r in range(copies):
            to_copy = next_input + r * all_samples + start
            _write(to_copy, at, stored, channels, pixels, NEXT, BLOCK)


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
def _table(pointer, at, channels, pixels, PIXELWISE: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of one objective and sample per position; a scalar four times where they repeat."""
    if PIXELWISE:
        return _read(pointer, at, channels, channels, pixels, 0, BLOCK, pointer.dtype.element_ty)
    else:
        value = tl.load(pointer)
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
    mu = _read(mean, at, channels, channels, pixels, LAYOUT, BLOCK, WIDE)
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


@triton.jit(
    do_not_specialize=[
        "step", "batch", "tiles", "noise_step",
        "variance_objective", "variance_sample", "weight_objective", "weight_sample",
    ]
)  # fmt: skip
def moments_step(
    out,  # (B, *S)
    means,  # M pointers (B, *S), or one pointer (M, B, *S) when STACKED
    variances, weights,  # from pointer + objective * _objective + sample * _sample on
    mean, variance,  # (B, *S) row-major | None
    noise, seeds,  # as in linear_step
    step,
    batch, channels, pixels, tiles, noise_step,
    variance_objective, variance_sample, weight_objective, weight_sample,
    M: tl.constexpr,
    STACKED: tl.constexpr,
    STEP_POINTER: tl.constexpr,
    VARIANCES: tl.constexpr, WEIGHTS: tl.constexpr,  # whether they are given per pixel, row-major
    OUT: tl.constexpr, MEANS: tl.constexpr, NOISE: tl.constexpr,  # layouts
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Eq. 7 elementwise and noise; `_eager.run_moments` is its definition."""
    wide: tl.constexpr = weights.dtype.element_ty
    at = _positions(channels, pixels, tiles, BLOCK)
    sample, size = at[0], channels.to(tl.int64) * pixels
    start, all_samples = sample * size, batch * size
    variances += sample * variance_sample
    weights += sample * weight_sample
    zero = tl.zeros((BLOCK,), wide)
    least = (zero + float("inf"), zero + float("inf"), zero + float("inf"), zero + float("inf"))
    precision = (zero, zero, zero, zero)
    totals = (zero, zero, zero, zero)
    # the numbers are read twice: where they are few from the cache, unrolled from registers
    if STACKED:
        for m in range(M):
            v = _table(variances + m * variance_objective, at, channels, pixels, VARIANCES, BLOCK)
            w = _table(weights + m * weight_objective, at, channels, pixels, WEIGHTS, BLOCK)
            least = _least(least, v, w)
        for m in range(M):
            v = _table(variances + m * variance_objective, at, channels, pixels, VARIANCES, BLOCK)
            w = _table(weights + m * weight_objective, at, channels, pixels, WEIGHTS, BLOCK)
            scaled = _scaled(least, v, w)
            mu = means + m * all_samples + start
            totals, precision = _accumulate(
                totals, precision, scaled, mu, at, channels, pixels, MEANS, BLOCK, wide
            )
    else:
        for m in tl.static_range(M):
            v = _table(variances + m * variance_objective, at, channels, pixels, VARIANCES, BLOCK)
            w = _table(weights + m * weight_objective, at, channels, pixels, WEIGHTS, BLOCK)
            least = _least(least, v, w)
        for m in tl.static_range(M):
            v = _table(variances + m * variance_objective, at, channels, pixels, VARIANCES, BLOCK)
            w = _table(weights + m * weight_objective, at, channels, pixels, WEIGHTS, BLOCK)
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
        _write(mean + start, at, mu_w, channels, pixels, 0, BLOCK)
    if variance is not None:
        _write(variance + start, at, var_w, channels, pixels, 0, BLOCK)
    if noise is not None or seeds is not None:
        k = tl.load(step) if STEP_POINTER else step.to(tl.int64)
        given = None if noise is None else noise + k * noise_step + start
        z = _noise(given, seeds, sample, k, at, channels, channels, pixels, NOISE, BLOCK, wide)
        std = (_root(var_w[0]), _root(var_w[1]), _root(var_w[2]), _root(var_w[3]))
        mu_w = _add_each(mu_w, std, z)
    _write(out + start, at, mu_w, channels, pixels, OUT, BLOCK)
