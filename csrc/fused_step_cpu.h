// SPDX-License-Identifier: Apache-2.0
// The CPU kernels: raw pointers, sizes and a number of threads; contiguous samples (B, C, P).
#pragma once

#include <cstdint>
#include <vector>

#include "msdda/storage.h"

namespace msdda {

struct Shape {
  std::int64_t batch, channels, pixels;  // a sample is channels x pixels, row-major
  std::int64_t sample() const { return channels * pixels; }
};

struct Array {
  void* data;  // null: absent
  DType dtype;
};

// Standard normal noise: given as an array, or drawn from seeds (batch,), or absent.
struct Noise {
  Array given;
  const std::int64_t* seeds;
  std::uint32_t step, stream;
};

struct LinearStep {
  Array out;
  Array x;                       // may be absent where its coefficient is 0
  std::vector<const void*> uncond;  // per objective, (B, C, P); null: its coefficients are 0
  std::vector<const void*> cond;
  DType outputs_dtype;
  Array rows;                // (B or 1, C) coefficients, float32 or float64: the accumulation type
  std::int64_t row_stride;   // C, or 0 when one row serves every sample
  bool clipped;              // the row has the clipped layout
  double clip_range;
  Noise noise;
  Shape shape;
  int threads;
};

// Per-objective numbers that repeat along axes of stride 0; `pixelwise` is 0 or 1.
struct Table {
  const void* data;
  std::int64_t objective_stride, sample_stride, pixelwise;
};

struct MomentsStep {
  Array out;
  std::vector<const void*> means;  // per objective, (B, C, P)
  DType means_dtype;
  Table variances, weights;  // in the accumulation type
  DType accumulate;          // kFloat32 or kFloat64
  void* mean;                // (B, C, P) in the accumulation type, or null
  void* variance;            // likewise
  Noise noise;
  Shape shape;
  int threads;
};

void linear_step(const LinearStep& step);
void moments_step(const MomentsStep& step);
void counter_noise(Array out, const Noise& noise, const Shape& shape, int threads);

}  // namespace msdda
