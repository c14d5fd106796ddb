// SPDX-License-Identifier: Apache-2.0
// The arguments of the GPU kernels, handed over by value: addresses, strides and sizes. Everything
// that changes between the replays of a captured graph is behind an address.
#pragma once

#include <cstdint>

#include "msdda/tile.h"

namespace msdda {

constexpr int kMaxObjectives = 128;  // two addresses each: kernel arguments stay below 4 KB

struct Extent {
  std::int64_t batch, channels, pixels;

  MSDDA_HD std::int64_t blocks() const { return (channels + kChannels - 1) / kChannels; }
  MSDDA_HD std::int64_t items(int pixels_each) const {
    return batch * blocks() * (pixels / pixels_each);
  }
};

// The step index: read on the device, so that a captured graph replays any step; or a number.
struct Counter {
  const std::int64_t* at;  // null: `value`
  std::int64_t value;

  MSDDA_HD std::int64_t now() const { return at != nullptr ? *at : value; }
};

// Standard normal noise: given, or drawn from seeds (B,), or absent.
struct NoiseSource {
  View given;
  std::int64_t given_step;  // elements from one step to the next; 0: the same for every step
  const std::int64_t* seeds;
  std::uint32_t stream;
};

struct LinearArguments {
  Extent extent;
  Counter step;
  View out, x;         // x may be absent, or out itself
  View next;           // `copies` converted copies of out, or absent
  std::int64_t copies, copy_stride;
  const void* rows;    // coefficients in the accumulation type
  std::int64_t row_step, row_sample;  // strides
  bool clipped;        // the rows have the clipped layout
  double clip_range;
  NoiseSource noise;
  View outputs;        // how every objective's output is laid out; no data
  int objectives;
  const void* uncond[kMaxObjectives];  // null: no such term
  const void* cond[kMaxObjectives];
};

// Numbers per objective, and per sample, channel and pixel unless that stride is 0; in the
// accumulation type.
struct Numbers {
  const void* data;
  std::int64_t objective, sample, channel, pixel;
};

struct MomentsArguments {
  Extent extent;
  Counter step;
  View out, mean, variance;  // the last two in the accumulation type, or absent
  Numbers variances, weights;
  NoiseSource noise;
  View means;  // how every mean is laid out; no data
  int objectives;
  const void* mean_of[kMaxObjectives];
};

struct NoiseArguments {
  Extent extent;
  Counter step;
  View out;
  const std::int64_t* seeds;
  std::uint32_t stream;
};

}  // namespace msdda
