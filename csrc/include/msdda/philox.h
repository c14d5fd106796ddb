// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011): four random words, a pure function of a counter.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MSDDA_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MSDDA_HD inline __attribute__((always_inline))
#else
#define MSDDA_HD inline
#endif

namespace msdda {

struct Words {
  std::uint32_t w0, w1, w2, w3;
};

// counter = (pixel, block, step, stream), key = (low, high) word of the seed
MSDDA_HD Words philox(Words counter, std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * counter.w0;
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * counter.w2;
    counter = Words{static_cast<std::uint32_t>(product1 >> 32) ^ counter.w1 ^ key0,
                    static_cast<std::uint32_t>(product1),
                    static_cast<std::uint32_t>(product0 >> 32) ^ counter.w3 ^ key1,
                    static_cast<std::uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace msdda
