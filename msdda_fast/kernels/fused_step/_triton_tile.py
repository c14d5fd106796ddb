# SPDX-License-Identifier: Apache-2.0
"""How a Triton program of the fused step meets memory: positions, layouts, reads and writes.

A program takes BLOCK positions of one sample. A position is a pixel of a block of four channels,
because one Philox call gives four normals; its values travel as a 4-tuple of tensors (BLOCK,).

Layouts: 0 row-major (channel, pixel); 1 channels last; 2 channels last with exactly four channels,
where the values of neighbouring positions follow each other and are read as one run.
"""

import triton
import triton.language as tl

from msdda_fast.kernels.counter_noise._triton import normals

__all__ = ["limit_if", "noise_of", "positions", "read", "rounded", "write"]


@triton.jit
def positions(channels, pixels, tiles, BLOCK: tl.constexpr):
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
    return run, run < limit * tl.cast(pixels, tl.int64)


@triton.jit
def limit_if(active, channels):
    """How many channels to read: none unless `active`."""
    return tl.where(active, channels, 0)


@triton.jit
def read(
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
def rounded(value, TO: tl.constexpr):
    """Convert as torch does: from float64 to a half format by way of float32."""
    if value.dtype == tl.float64 and TO.primitive_bitwidth == 16:
        return value.to(tl.float32).to(TO)
    else:
        return value.to(TO)


@triton.jit
def write(pointer, at, values, channels, pixels, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    to: tl.constexpr = pointer.dtype.element_ty
    if LAYOUT == 2:
        run, exists = _run(at, channels, pixels, BLOCK)
        halves = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
        tl.store(pointer + run, rounded(tl.reshape(halves, (4 * BLOCK,)), to), mask=exists)
    else:
        for i in tl.static_range(4):
            exists = 4 * at[3] + i < channels
            offset = _offset(at, i, channels, pixels, LAYOUT)
            tl.store(pointer + offset, rounded(values[i], to), mask=exists)


@triton.jit
def noise_of(
    noise, seeds, sample, k, at, limit, channels, pixels,
    NOISE_LAYOUT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """z of the positions: read, or drawn on stream 1 (STREAM_STEP)."""
    if seeds is None:
        return read(noise, at, limit, channels, pixels, NOISE_LAYOUT, BLOCK, WIDE)
    else:
        drawn = normals(tl.load(seeds + sample), at[4].to(tl.uint32), at[3].to(tl.uint32), k, 1)
        return drawn[0].to(WIDE), drawn[1].to(WIDE), drawn[2].to(WIDE), drawn[3].to(WIDE)
