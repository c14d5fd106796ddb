// SPDX-License-Identifier: Apache-2.0
// The portable normal: Box-Muller from IEEE float32 products, sums and a correctly rounded root.
//
// Defined by msdda_fast/kernels/counter_noise/_eager.py, operation by operation; the bits are equal
// as long as no product and sum are contracted: -ffp-contract=off for g++ and clang, --fmad=false
// for nvcc.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "msdda/philox.h"

namespace msdda {

MSDDA_HD std::int32_t float_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_int(value);
#else
  std::int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

MSDDA_HD float bits_float(std::int32_t bits) {
#ifdef __CUDA_ARCH__
  return __int_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// log u for u in [2^-24, 1]: mantissa in [sqrt(1/2), sqrt(2)), exponent apart
MSDDA_HD float portable_log(float u) {
  const std::int32_t bits = float_bits(u);
  const std::int32_t exponent = (bits - 0x3F3504F3) >> 23;  // floor, also below zero
  const float x = bits_float(bits - exponent * (1 << 23)) - 1.0f;
  const float e = static_cast<float>(exponent);
  const float square = x * x;
  float tail = -0.07634501159191132f;
  tail = tail * x + 0.1276158094406128f;
  tail = tail * x + -0.13160182535648346f;
  tail = tail * x + 0.14201757311820984f;
  tail = tail * x + -0.16623356938362122f;
  tail = tail * x + 0.20001226663589478f;
  tail = tail * x + -0.2500081956386566f;
  tail = tail * x + 0.3333333134651184f;
  tail = tail * (x * square);
  tail = tail + e * -2.12194440e-4f;
  tail = tail - 0.5f * square;
  return (x + tail) + e * 0.693359375f;
}

struct NormalPair {
  float x, y;
};

// Two standard normals from two words; |z| <= 5.77
MSDDA_HD NormalPair standard_normals(std::uint32_t even, std::uint32_t odd) {
  // signed, because 24 bits fit and signed integers convert to float in one vector instruction
  const auto k = static_cast<std::int32_t>((even >> 8) + 1);
  const float u = static_cast<float>(k) * 0x1p-24f;
  const float radius = std::sqrt(-2.0f * portable_log(u));
  const auto angle = static_cast<std::int32_t>(odd >> 8);  // in units of 2 pi / 2^24
  const std::int32_t quadrant = (angle + (1 << 21)) >> 22;
  const float r = static_cast<float>(angle - (quadrant << 22)) * 0x1p-22f;
  const float square = r * r;
  float sine = -0.0046021779999136925f;
  sine = sine * square + 0.07968022674322128f;
  sine = sine * square + -0.6459634900093079f;
  sine = sine * square + 1.5707963705062866f;
  sine = sine * r;
  float cosine = 0.0009040216682478786f;
  cosine = cosine * square + -0.02086028829216957f;
  cosine = cosine * square + 0.25366923213005066f;
  cosine = cosine * square + -1.2337005138397217f;
  cosine = cosine * square + 1.0f;
  const bool swap = (quadrant & 1) != 0;  // a quarter turn: (c, s) -> (-s, c)
  const float x = swap ? sine : cosine;
  const float y = swap ? cosine : sine;
  return {radius * (((quadrant + 1) & 2) != 0 ? -x : x), radius * ((quadrant & 2) != 0 ? -y : y)};
}

}  // namespace msdda
