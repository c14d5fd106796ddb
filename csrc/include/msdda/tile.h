// SPDX-License-Identifier: Apache-2.0
// What one GPU thread holds: 4 channels (one Philox call) of V neighbouring pixels, and how it
// moves between registers and tensors of any dtype, NCHW or NHWC.
//
// Nothing here needs CUDA: tests/kernels/host_threads.cpp runs the same code on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "msdda/storage.h"

#ifdef __CUDA_ARCH__
#define MSDDA_UNROLL _Pragma("unroll")
#else
#define MSDDA_UNROLL
#endif

namespace msdda {

constexpr int kChannels = 4;  // per thread

template <class A, int V>
struct Tile {
  A at[kChannels][V];
};

// Where the tile of a thread lies.
struct Place {
  std::int64_t sample, channel, pixel;  // of its first element
  int channels;                         // 4, or fewer at the end of a sample
};

// A dense tensor (B, C, P), NCHW or NHWC. `grouped`: the 4 channels of a pixel move at once;
// otherwise the neighbouring pixels of a channel do. Grouped inputs go to kernels with V = 1 only:
// there the threads of a warp read one contiguous stretch.
struct View {
  void* data;  // null: absent
  DType dtype;
  bool grouped;
  std::int64_t sample, channel, pixel;  // strides in elements

  MSDDA_HD std::int64_t offset(const Place& place) const {
    return place.sample * sample + place.channel * channel + place.pixel * pixel;
  }
};

// 8 or 16 bytes that one instruction moves.
template <int kBytes>
struct Chunk {
  std::uint32_t words[kBytes / 4];
};

// Through CUDA's vector types, which nvcc loads whole. It takes most stores of them apart into
// 4-byte ones, hence the assembler below.
template <int kBytes>
MSDDA_HD Chunk<kBytes> load_chunk(const void* from) {
#ifdef __CUDA_ARCH__
  if constexpr (kBytes == 16) {
    const uint4 v = *static_cast<const uint4*>(from);
    return {{v.x, v.y, v.z, v.w}};
  } else {
    const uint2 v = *static_cast<const uint2*>(from);
    return {{v.x, v.y}};
  }
#else
  Chunk<kBytes> chunk;
  std::memcpy(&chunk, from, sizeof chunk);
  return chunk;
#endif
}

template <int kBytes>
MSDDA_HD void store_chunk(void* to, const Chunk<kBytes>& chunk) {
#ifdef __CUDA_ARCH__
  const std::uint32_t* words = chunk.words;
  const std::size_t address = __cvta_generic_to_global(to);
  if constexpr (kBytes == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  } else {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1])
                 : "memory");
  }
#else
  std::memcpy(to, &chunk, sizeof chunk);
#endif
}

// Element i of little-endian words; i is known once loops are unrolled.
MSDDA_HD void unpack(float& value, const std::uint32_t* words, int i) {
  value = bits_float(static_cast<std::int32_t>(words[i]));
}

MSDDA_HD void unpack(double& value, const std::uint32_t* words, int i) {
  const std::uint64_t bits = std::uint64_t{words[2 * i + 1]} << 32 | words[2 * i];
#ifdef __CUDA_ARCH__
  value = __longlong_as_double(static_cast<long long>(bits));
#else
  std::memcpy(&value, &bits, sizeof value);
#endif
}

template <class Half>
MSDDA_HD void unpack(Half& value, const std::uint32_t* words, int i) {
  value.bits = static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2)));
}

// Puts element i; the words start as zeros.
MSDDA_HD void pack(std::uint32_t* words, int i, float value) {
  words[i] = static_cast<std::uint32_t>(float_bits(value));
}

MSDDA_HD void pack(std::uint32_t* words, int i, double value) {
#ifdef __CUDA_ARCH__
  const auto bits = static_cast<std::uint64_t>(__double_as_longlong(value));
#else
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
#endif
  words[2 * i] = static_cast<std::uint32_t>(bits);
  words[2 * i + 1] = static_cast<std::uint32_t>(bits >> 32);
}

template <class Half>
MSDDA_HD void pack(std::uint32_t* words, int i, Half value) {
  words[i / 2] |= std::uint32_t{value.bits} << (16 * (i % 2));
}

// N contiguous elements, in the fewest instructions; values lie `stride` apart in the tile.
template <int N, class T, class A>
MSDDA_HD void read_run(A* values, int stride, const T* from) {
  if constexpr (N == 1) {
    values[0] = load<A>(from[0]);
  } else {
    constexpr int kBytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
    constexpr int kEach = kBytes / sizeof(T);
    MSDDA_UNROLL
    for (int i = 0; i < N; i += kEach) {
      const auto chunk = load_chunk<kBytes>(from + i);
      MSDDA_UNROLL
      for (int j = 0; j < kEach; ++j) {
        T element;
        unpack(element, chunk.words, j);
        values[(i + j) * stride] = load<A>(element);
      }
    }
  }
}

template <int N, class T, class A>
MSDDA_HD void write_run(T* to, const A* values, int stride) {
  if constexpr (N == 1) {
    store(to[0], values[0]);
  } else {
    constexpr int kBytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
    constexpr int kEach = kBytes / sizeof(T);
    MSDDA_UNROLL
    for (int i = 0; i < N; i += kEach) {
      Chunk<kBytes> chunk = {};
      MSDDA_UNROLL
      for (int j = 0; j < kEach; ++j) {
        T element;
        store(element, values[(i + j) * stride]);
        pack(chunk.words, j, element);
      }
      store_chunk(to + i, chunk);
    }
  }
}

// The tile at `from`, the address of its first element in a tensor laid out like `view`.
template <class T, class A, int V>
MSDDA_HD void read_tile(Tile<A, V>& tile, const T* from, const View& view, int channels) {
  if (V == 1 && view.grouped) {
    read_run<kChannels>(tile.at[0], 1, from);
  } else {
    MSDDA_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      if (i < channels) read_run<V>(tile.at[i], 1, from + i * view.channel);
    }
  }
}

template <class T, class A, int V>
MSDDA_HD void write_tile(T* to, const Tile<A, V>& tile, const View& view, int channels) {
  if (view.grouped) {
    MSDDA_UNROLL
    for (int v = 0; v < V; ++v) write_run<kChannels>(to + v * view.pixel, &tile.at[0][v], V);
  } else {
    MSDDA_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      if (i < channels) write_run<V>(to + i * view.channel, tile.at[i], 1);
    }
  }
}

// The same with the dtype found at run time: it is the same for all threads, so the branch costs
// next to nothing, and sixteen pairs of dtypes need no code each.
template <class A, int V>
MSDDA_HD void read(Tile<A, V>& tile, const View& view, std::int64_t offset, int channels) {
  switch (view.dtype) {
    case DType::kFloat32:
      return read_tile(tile, static_cast<const float*>(view.data) + offset, view, channels);
    case DType::kFloat64:
      return read_tile(tile, static_cast<const double*>(view.data) + offset, view, channels);
    case DType::kBFloat16:
      return read_tile(tile, static_cast<const BFloat16*>(view.data) + offset, view, channels);
    case DType::kFloat16:
      return read_tile(tile, static_cast<const Float16*>(view.data) + offset, view, channels);
  }
}

template <class A, int V>
MSDDA_HD void write(const View& view, std::int64_t offset, const Tile<A, V>& tile, int channels) {
  switch (view.dtype) {
    case DType::kFloat32:
      return write_tile(static_cast<float*>(view.data) + offset, tile, view, channels);
    case DType::kFloat64:
      return write_tile(static_cast<double*>(view.data) + offset, tile, view, channels);
    case DType::kBFloat16:
      return write_tile(static_cast<BFloat16*>(view.data) + offset, tile, view, channels);
    case DType::kFloat16:
      return write_tile(static_cast<Float16*>(view.data) + offset, tile, view, channels);
  }
}

// What a tensor of type T makes of each value.
template <class T, class A, int V>
MSDDA_HD void round_as(Tile<A, V>& tile) {
  MSDDA_UNROLL
  for (int i = 0; i < kChannels; ++i) {
    MSDDA_UNROLL
    for (int v = 0; v < V; ++v) {
      T element;
      store(element, tile.at[i][v]);
      tile.at[i][v] = load<A>(element);
    }
  }
}

template <class A, int V>
MSDDA_HD void round_as(Tile<A, V>& tile, DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return round_as<float>(tile);
    case DType::kFloat64: return round_as<double>(tile);
    case DType::kBFloat16: return round_as<BFloat16>(tile);
    case DType::kFloat16: return round_as<Float16>(tile);
  }
}

}  // namespace msdda
