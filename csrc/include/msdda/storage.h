// SPDX-License-Identifier: Apache-2.0
// Storage types. Conversions round to nearest even. On the CPU they are branchless, so that loops
// over them vectorise on any instruction set; NaN becomes the quiet NaN that torch writes. The GPU
// has an instruction for each: the same bits, up to the payload of NaN. It is written as assembler,
// because cuda_fp16.h needs a package (CCCL) that not every toolkit brings.
#pragma once

#include <cstdint>

#include "msdda/normal.h"

namespace msdda {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

template <class A>
MSDDA_HD A load(float value) {
  return static_cast<A>(value);
}

template <class A>
MSDDA_HD A load(double value) {
  return static_cast<A>(value);
}

template <class A>
MSDDA_HD A load(BFloat16 value) {
  return static_cast<A>(bits_float(static_cast<std::int32_t>(std::uint32_t{value.bits} << 16)));
}

template <class A>
MSDDA_HD A load(Float16 value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return static_cast<A>(wide);
#else
  const std::uint32_t magnitude = value.bits & 0x7FFFu;
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
  const std::uint32_t rebias = magnitude >= 0x7C00u ? 0x70000000u : 0x38000000u;  // Inf, NaN
  const std::uint32_t normal = (magnitude << 13) + rebias;
  const std::uint32_t bits =
      magnitude < 0x0400u ? static_cast<std::uint32_t>(float_bits(subnormal)) : normal;
  return static_cast<A>(bits_float(static_cast<std::int32_t>(bits | sign)));
#endif
}

MSDDA_HD void store(float& to, float value) { to = value; }
MSDDA_HD void store(float& to, double value) { to = static_cast<float>(value); }
MSDDA_HD void store(double& to, float value) { to = static_cast<double>(value); }
MSDDA_HD void store(double& to, double value) { to = value; }

MSDDA_HD void store(BFloat16& to, float value) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
  const auto bits = static_cast<std::uint32_t>(float_bits(value));
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
#endif
}

MSDDA_HD void store(Float16& to, float value) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
  const auto all = static_cast<std::uint32_t>(float_bits(value));
  const std::uint32_t bits = all & 0x7FFFFFFFu;
  const std::uint32_t sign = (all >> 16) & 0x8000u;
  // adding 1/2 leaves a multiple of 2^-24, the subnormal spacing, in the last bits
  const float shifted = bits_float(static_cast<std::int32_t>(bits)) + 0.5f;
  const std::uint32_t subnormal = static_cast<std::uint32_t>(float_bits(shifted)) - 0x3F000000u;
  const std::uint32_t normal = (bits - 0x38000000u + 0x0FFFu + ((bits >> 13) & 1u)) >> 13;
  std::uint32_t half = bits < 0x38800000u ? subnormal : normal;
  half = bits >= 0x47800000u ? 0x7C00u : half;
  half = bits > 0x7F800000u ? 0x7E00u : half;
  to.bits = static_cast<std::uint16_t>(half | sign);
#endif
}

MSDDA_HD void store(BFloat16& to, double value) { store(to, static_cast<float>(value)); }
MSDDA_HD void store(Float16& to, double value) { store(to, static_cast<float>(value)); }

}  // namespace msdda
