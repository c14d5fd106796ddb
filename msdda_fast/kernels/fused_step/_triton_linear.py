# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of a step from raw outputs: one launch, every input read once.

Arithmetic is in the dtype of the coefficients, in the order of `_eager.py`, and must not be
contracted (`enable_fp_fusion=False`), so the bits are those of eager. `_triton_tile` says what a
program reads and writes.
"""

import triton
import triton.language as tl

from msdda_fast.kernels.fused_step._triton_tile import (
    limit_if,
    noise_of,
    positions,
    read,
    rounded,
    write,
)

__all__ = ["linear_step"]


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
    COLUMNS: tl.constexpr, GUIDED: tl.constexpr, RANGE: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add what objective m contributes: its two outputs and, when clipped, its x_0 prediction."""
    x0_scale, x0_u, x0_c, u, u_values = 0.0, 0.0, 0.0, 0.0, totals
    c = tl.load(row + COLUMNS[2] + m)
    if RANGE is not None:
        x0_scale, x0_c = tl.load(row + COLUMNS[7] + m), tl.load(row + COLUMNS[6] + m)
    c_active = (c != 0) | ((x0_scale != 0) & (x0_c != 0))
    if GUIDED:
        u = tl.load(row + COLUMNS[1] + m)
        if RANGE is not None:
            x0_u = tl.load(row + COLUMNS[5] + m)
        u_active = (u != 0) | ((x0_scale != 0) & (x0_u != 0))
        limit = limit_if(u_active, channels)
        u_values = read(uncond, at, limit, channels, pixels, LAYOUT, BLOCK, WIDE)
        totals = _add(totals, u, u_values)
    limit = limit_if(c_active, channels)
    c_values = read(cond, at, limit, channels, pixels, LAYOUT, BLOCK, WIDE)
    totals = _add(totals, c, c_values)
    if RANGE is not None and x is not None:
        zero = tl.zeros((BLOCK,), WIDE)
        x_0 = _add((zero, zero, zero, zero), tl.load(row + COLUMNS[4]), x)
        if GUIDED:
            x_0 = _add(x_0, x0_u, u_values)
        x_0 = _add(x_0, x0_c, c_values)
        totals = _add_clipped(totals, x0_scale, x_0, RANGE)
    return totals


@triton.jit(do_not_specialize=["step", "batch", "row_step", "row_sample", "copies", "tiles"])
def linear_step(
    out,  # (B, *S)
    x,  # (B, *S) | None
    outputs,  # M pointers (K, B, *S) | None, or one pointer (M, K, B, *S) when STACKED
    rows,  # coefficients, C of them from rows + step * row_step + sample * row_sample on
    noise,  # (B, *S), or (T, B, *S) when NOISE_TABLE | None
    seeds,  # (B,) int64 | None
    next_input,  # (copies, B, *S) | None
    step,  # int, or pointer to one int64 when STEP_POINTER
    batch, channels, pixels, tiles, row_step, row_sample, copies,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,  # where a row holds which coefficient; see `_triton.columns`
    BRANCHES: tl.constexpr,  # K of each objective
    STACKED: tl.constexpr,
    STEP_POINTER: tl.constexpr, NOISE_TABLE: tl.constexpr,
    RANGE: tl.constexpr,  # clip range | None
    OUT: tl.constexpr, X: tl.constexpr, OUTPUTS: tl.constexpr, NOISE: tl.constexpr,
    NEXT: tl.constexpr,  # layouts
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One reverse step from raw network outputs; `_eager.run` is its definition."""
    wide: tl.constexpr = rows.dtype.element_ty
    at = positions(channels, pixels, tiles, BLOCK)
    sample, size = at[0], tl.cast(channels, tl.int64) * pixels
    start, all_samples = sample * size, batch * size
    k = tl.load(step) if STEP_POINTER else step.to(tl.int64)
    row = rows + k * row_step + sample * row_sample
    zero = tl.zeros((BLOCK,), wide)
    totals = (zero, zero, zero, zero)
    x_values = None
    if x is not None:
        scale = tl.load(row + COLUMNS[0])
        active = scale != 0
        if RANGE is not None:
            active = active | (tl.load(row + COLUMNS[4]) != 0)
        x_values = read(x + start, at, limit_if(active, channels), channels, pixels, X, BLOCK, wide)
        totals = _add(totals, scale, x_values)
    if STACKED:
        for m in range(M):
            uncond = outputs + m * BRANCHES * all_samples + start
            totals = _objective(
                totals, uncond, uncond + (BRANCHES - 1) * all_samples, x_values, row, m, at,
                channels, pixels, COLUMNS, BRANCHES == 2, RANGE, OUTPUTS, BLOCK, wide,
            )  # fmt: skip
    else:
        for m in tl.static_range(M):
            if outputs[m] is not None:
                uncond = outputs[m] + start
                totals = _objective(
                    totals, uncond, uncond + (BRANCHES[m] - 1) * all_samples, x_values, row, m, at,
                    channels, pixels, COLUMNS, BRANCHES[m] == 2, RANGE, OUTPUTS, BLOCK,
                    wide,
                )  # fmt: skip
    if noise is not None or seeds is not None:
        scale = tl.load(row + COLUMNS[3])
        given = None if noise is None else noise + k * NOISE_TABLE * all_samples + start
        limit = limit_if(scale != 0, channels)
        z = noise_of(given, seeds, sample, k, at, limit, channels, pixels, NOISE, BLOCK, wide)
        totals = _add(totals, scale, z)
    write(out + start, at, totals, channels, pixels, OUT, BLOCK)
    if next_input is not None:
        stored = ()  # the copies are of `out`, so its rounding comes first
        for i in tl.static_range(4):
            stored = stored + (rounded(totals[i], out.dtype.element_ty),)
        for r in range(copies):
            to_copy = next_input + r * all_samples + start
            write(to_copy, at, stored, channels, pixels, NEXT, BLOCK)
