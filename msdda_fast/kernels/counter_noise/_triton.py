# SPDX-License-Identifier: Apache-2.0
"""Counter noise in Triton: the bits of `_eager.py`, drawn where they are used.

Launch every kernel that calls these with `enable_fp_fusion=False`: contracting a product and a sum
changes the result.
"""

import triton
import triton.language as tl
from torch import Tensor

from msdda_fast.kernels.current_device import on_its_device

__all__ = ["normals", "run"]

_BLOCK = 512


@triton.jit
def _log(u):
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # of sqrt(1/2): floor, also below zero
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    square = x * x
    tail = x * -0.07634501159191132 + 0.1276158094406128
    tail = tail * x + -0.13160182535648346
    tail = tail * x + 0.14201757311820984
    tail = tail * x + -0.16623356938362122
    tail = tail * x + 0.20001226663589478
    tail = tail * x + -0.2500081956386566
    tail = tail * x + 0.3333333134651184
    tail = tail * (x * square)
    tail = tail + e * -2.12194440e-4
    tail = tail - 0.5 * square
    return (x + tail) + e * 0.693359375


@triton.jit
def _box_muller(even, odd):
    u = ((even >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    radius = tl.sqrt_rn(-2.0 * _log(u))
    angle = (odd >> 8).to(tl.int32)  # in units of 2 pi / 2^24
    quadrant = (angle + 2097152) >> 22
    r = (angle - (quadrant << 22)).to(tl.float32) * 2.384185791015625e-07  # 2^-22
    square = r * r
    sine = square * -0.0046021779999136925 + 0.07968022674322128
    sine = sine * square + -0.6459634900093079
    sine = sine * square + 1.5707963705062866
    sine = sine * r
    cosine = square * 0.0009040216682478786 + -0.02086028829216957
    cosine = cosine * square + 0.25366923213005066
    cosine = cosine * square + -1.2337005138397217
    cosine = cosine * square + 1.0
    swap = (quadrant & 1) != 0  # a quarter turn: (c, s) -> (-s, c)
    x = tl.where(swap, sine, cosine)
    y = tl.where(swap, cosine, sine)
    x = tl.where(((quadrant + 1) & 2) != 0, -x, x)
    y = tl.where((quadrant & 2) != 0, -y, y)
    return radius * x, radius * y


@triton.jit
def normals(seed, pixel, block, step, stream):
    """Four float32 normals per position: those of channels 4 block .. 4 block + 3 at `pixel`."""
    zero = pixel * 0
    words = tl.philox(seed, pixel, block, zero + step.to(tl.uint32), zero + stream)
    first = _box_muller(words[0], words[1])
    second = _box_muller(words[2], words[3])
    return first[0], first[1], second[0], second[1]


@triton.jit(do_not_specialize=["step", "stream", "tiles"])
def noise_fill(
    out, seeds, step, stream, channels, pixels, tiles,
    STEP_POINTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    q = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    block, pixel = q // pixels, q % pixels
    k = tl.load(step) if STEP_POINTER else step.to(tl.int64)
    z = normals(
        tl.load(seeds + sample), pixel.to(tl.uint32), block.to(tl.uint32), k, stream.to(tl.uint32)
    )
    start = out + sample * channels * pixels
    for i in tl.static_range(4):
        channel = 4 * block + i
        to = start + channel.to(tl.int64) * pixels + pixel
        tl.store(to, z[i].to(out.dtype.element_ty), mask=channel < channels)


@on_its_device
def run(out: Tensor, seeds: Tensor, step: int | Tensor, stream: int) -> None:
    """Fill contiguous `out` (B, C, ...) with the noise of `seeds` (B,)."""
    if out.numel() == 0:
        return
    batch, channels = out.shape[:2]
    pixels = out.numel() // (batch * channels)
    tiles = triton.cdiv(-(-channels // 4) * pixels, _BLOCK)
    on_device = isinstance(step, Tensor) and step.device == out.device
    noise_fill[(batch * tiles,)](
        out, seeds, step if on_device else int(step), stream, channels, pixels, tiles,
        STEP_POINTER=on_device, BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
