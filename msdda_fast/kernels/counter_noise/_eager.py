# SPDX-License-Identifier: Apache-2.0
"""Counter noise in plain torch: the definition that every other backend equals bit for bit.

Philox4x32-10 turns (seed; pixel, block, step, stream) into four 32-bit words; Box-Muller turns
words (0, 1) and (2, 3) into the normals of channels 4 block .. 4 block + 3 at that pixel:

    u = (w_even // 2^8 + 1) / 2^24,  a = (w_odd // 2^8) / 2^24,
    z = sqrt(-2 log u) (cos 2 pi a, sin 2 pi a).

The logarithm, sine and cosine are short polynomials in float32 (minimax fits, relative error below
1e-8 before rounding) built from IEEE multiplications and additions only, so that any machine gets
the same bits as long as nothing contracts a product and a sum into one fused operation. The square
root goes through float64 because `torch.sqrt` on float32 is 1 ulp off on some CPU builds.
"""

import torch
from torch import Tensor

__all__ = ["philox", "run", "standard_normals"]

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Salmon et al. 2011, Philox4x32
_WEYL = (0x9E3779B9, 0xBB67AE85)

# log(1 + x) = x - x^2/2 + x^3 P(x) on [sqrt(1/2) - 1, sqrt(2) - 1], highest power first
_LOG = (
    -0.07634501159191132, 0.1276158094406128, -0.13160182535648346, 0.14201757311820984,
    -0.16623356938362122, 0.20001226663589478, -0.2500081956386566, 0.3333333134651184,
)  # fmt: skip
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # the high part times any exponent is exact
_SQRT_HALF_BITS = 0x3F3504F3
# sin(pi/2 r) = r S(r^2), cos(pi/2 r) = 1 + r^2 C(r^2) on |r| <= 1/2, highest power first
_SIN = (-0.0046021779999136925, 0.07968022674322128, -0.6459634900093079, 1.5707963705062866)
_COS = (0.0009040216682478786, -0.02086028829216957, 0.25366923213005066, -1.2337005138397217)


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * word; the whole product would overflow int64."""
    low = (factor & 0xFFFF) * word
    high = (factor >> 16) * word + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words from a two-word key and a four-word counter.

    Args:
        key: Two int64 tensors with values in [0, 2^32), broadcastable with the counters.
        counter: Four such tensors.

    Returns:
        Four int64 tensors with values in [0, 2^32), of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _log(u: Tensor) -> Tensor:
    """log u for float32 u in [2^-24, 1]: mantissa in [sqrt(1/2), sqrt(2)), exponent apart."""
    bits = u.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    x = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.to(torch.float32)
    square = x * x
    tail = _horner(_LOG, x) * (x * square)
    tail = tail + e * _LN2_LOW
    tail = tail - 0.5 * square
    return (x + tail) + e * _LN2_HIGH


def standard_normals(even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 standard normals from two 32-bit words by Box-Muller; |z| <= 5.77."""
    u = ((even >> 8) + 1).to(torch.float32) * 2.0**-24
    radius = (-2.0 * _log(u)).double().sqrt().float()
    angle = odd >> 8  # in units of 2 pi / 2^24
    quadrant = (angle + (1 << 21)) >> 22
    r = (angle - (quadrant << 22)).to(torch.float32) * 2.0**-22
    square = r * r
    sine = _horner(_SIN, square) * r
    cosine = _horner(_COS, square) * square + 1.0
    swap = (quadrant & 1) == 1  # a quarter turn: (c, s) -> (-s, c)
    x, y = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    x = torch.where(((quadrant + 1) & 2) == 2, -x, x)
    y = torch.where((quadrant & 2) == 2, -y, y)
    return radius * x, radius * y


def run(out: Tensor, seeds: Tensor, step: int | Tensor, stream: int) -> None:
    """Fill `out` (B, C, ...) of any float dtype with the noise of `seeds` (B,) int64."""
    batch, channels = out.shape[:2]
    pixels = out[0, 0].numel() if batch * channels else 0
    blocks = -(-channels // 4)
    device = out.device
    counter = (
        torch.arange(pixels, device=device).view(1, 1, -1),
        torch.arange(blocks, device=device).view(1, -1, 1),
        torch.as_tensor(step, dtype=torch.int64, device=device).view(1, 1, 1),
        torch.full((1, 1, 1), stream, device=device),
    )
    seed = seeds.view(-1, 1, 1)
    words = philox((seed & _WORD, (seed >> 32) & _WORD), counter)
    normals = (*standard_normals(words[0], words[1]), *standard_normals(words[2], words[3]))
    planes = torch.stack(normals, dim=2).view(batch, 4 * blocks, pixels)
    out.copy_(planes[:, :channels].reshape(out.shape))
