// SPDX-License-Identifier: Apache-2.0
// Loops over a tile of contiguous elements, compiled per instruction set and picked at load time.
#pragma once

#include <cstdint>

#include "msdda/storage.h"

namespace msdda {

// total += coefficient * value; coefficient != 0
void add_terms(float* total, float coefficient, const float* value, int n);
void add_terms(float* total, float coefficient, const BFloat16* value, int n);
void add_terms(float* total, float coefficient, const Float16* value, int n);
void add_terms(float* total, float coefficient, const double* value, int n);
void add_terms(double* total, double coefficient, const float* value, int n);
void add_terms(double* total, double coefficient, const double* value, int n);
void add_terms(double* total, double coefficient, const BFloat16* value, int n);
void add_terms(double* total, double coefficient, const Float16* value, int n);

// to = round(from)
void store_tile(float* to, const float* from, int n);
void store_tile(BFloat16* to, const float* from, int n);
void store_tile(Float16* to, const float* from, int n);
void store_tile(double* to, const float* from, int n);
void store_tile(float* to, const double* from, int n);
void store_tile(double* to, const double* from, int n);
void store_tile(BFloat16* to, const double* from, int n);
void store_tile(Float16* to, const double* from, int n);

// total += coefficient * clamp(value, -range, range)
void add_clipped(float* total, float coefficient, const float* value, float range, int n);
void add_clipped(double* total, double coefficient, const double* value, double range, int n);

// least = min over active objectives, one objective at a time
void fold_least(float* least, const float* variance, const float* weight, int n);
void fold_least(double* least, const double* variance, const double* weight, int n);

// scaled = w_i r_i; precision += scaled
void scale_weights(float* scaled, float* precision, const float* least, const float* variance,
                   const float* weight, int n);
void scale_weights(double* scaled, double* precision, const double* least, const double* variance,
                   const double* weight, int n);

// total += coefficient[j] * value[j], masked where the coefficient is 0
void add_products(float* total, const float* coefficient, const float* value, int n);
void add_products(double* total, const double* coefficient, const double* value, int n);

// total /= precision, least /= precision: the fused mean and variance
void normalise(float* total, float* least, const float* precision, int n);
void normalise(double* total, double* least, const double* precision, int n);

// value = sqrt(value)
void square_root(float* value, int n);
void square_root(double* value, int n);

// Noise of n positions of one sample: z + i * stride holds channel 4 block + i, i = 0..3.
void draw_normals(float* z, std::int64_t stride, const std::uint32_t* pixel,
                  const std::uint32_t* block, std::uint32_t step, std::uint32_t stream,
                  std::uint64_t seed, int n);

}  // namespace msdda
