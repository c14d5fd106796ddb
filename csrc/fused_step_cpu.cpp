// SPDX-License-Identifier: Apache-2.0
// A sample is cut into tiles that stay in the first-level cache: each input is read once, in order,
// and the result written once, whatever the number of objectives.
#include "fused_step_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "vector_loops.h"

namespace msdda {
namespace {

constexpr int kTile = 1024;               // floats per row: 4 kB, so that six rows fit in 32 kB
constexpr std::int64_t kGrain = 1 << 15;  // elements per thread that pay for waking it (>= 20 us)

// Calls f(pointer to the element at `offset`, in its own type).
template <class F>
void at(const void* data, DType dtype, std::int64_t offset, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<const float*>(data) + offset);
    case DType::kFloat64: return f(static_cast<const double*>(data) + offset);
    case DType::kBFloat16: return f(static_cast<const BFloat16*>(data) + offset);
    case DType::kFloat16: return f(static_cast<const Float16*>(data) + offset);
  }
}

template <class A>
void add(A* total, A coefficient, const void* data, DType dtype, std::int64_t offset, int n) {
  if (coefficient == A{0} || data == nullptr) return;  // masked, NaN and Inf included
  at(data, dtype, offset, [&](const auto* value) { add_terms(total, coefficient, value, n); });
}

template <class A>
void write(const Array& out, std::int64_t offset, const A* value, int n) {
  at(out.data, out.dtype, offset, [&](const auto* to) {
    store_tile(const_cast<std::remove_const_t<std::remove_pointer_t<decltype(to)>>*>(to), value, n);
  });
}

template <class Body>
void for_each_tile(std::int64_t tiles, std::int64_t elements, int threads, Body&& body) {
  const std::int64_t grains = std::max<std::int64_t>(1, elements / kGrain);
  const auto useful = static_cast<int>(std::min<std::int64_t>(threads, grains));
#pragma omp parallel for schedule(static) num_threads(useful) if (useful > 1)
  for (std::int64_t tile = 0; tile < tiles; ++tile) body(tile);
}

// Draws the noise of block after block and hands out runs of consecutive elements:
// segment(sample, offset in the sample, n <= kTile, z).
template <class Segment>
void for_each_drawn(const Noise& noise, const Shape& shape, int threads, Segment&& segment) {
  const std::int64_t blocks = (shape.channels + 3) / 4;
  // a tile is up to kTile pixels of one block or, for small images, several whole blocks
  const std::int64_t width = std::min<std::int64_t>(shape.pixels, kTile);
  const std::int64_t columns = (shape.pixels + width - 1) / width;
  const std::int64_t depth = columns > 1 ? 1 : std::clamp<std::int64_t>(kTile / width, 1, blocks);
  const std::int64_t layers = (blocks + depth - 1) / depth;
  const std::int64_t per_sample = layers * columns;
  const std::int64_t cost = 2 * shape.batch * shape.sample();  // a drawn element costs two others
  for_each_tile(shape.batch * per_sample, cost, threads, [&](std::int64_t tile) {
    std::uint32_t pixel[kTile] = {}, block[kTile] = {};
    float z[4 * kTile];
    const std::int64_t sample = tile / per_sample;
    const std::int64_t first_block = tile % per_sample / columns * depth;
    const std::int64_t first_pixel = tile % columns * width;
    const std::int64_t tile_blocks = std::min(depth, blocks - first_block);
    const std::int64_t tile_pixels = std::min(width, shape.pixels - first_pixel);
    const auto n = static_cast<int>(tile_blocks * tile_pixels);
    for (std::int64_t b = 0, j = 0; b < tile_blocks; ++b) {
      for (std::int64_t p = 0; p < tile_pixels; ++p, ++j) {
        block[j] = static_cast<std::uint32_t>(first_block + b);
        pixel[j] = static_cast<std::uint32_t>(first_pixel + p);
      }
    }
    draw_normals(z, kTile, pixel, block, noise.step, noise.stream,
                 static_cast<std::uint64_t>(noise.seeds[sample]), n);
    for (std::int64_t b = 0; b < tile_blocks; ++b) {
      for (std::int64_t i = 0; i < 4; ++i) {
        const std::int64_t channel = 4 * (first_block + b) + i;
        if (channel >= shape.channels) break;
        segment(sample, channel * shape.pixels + first_pixel, static_cast<int>(tile_pixels),
                z + i * kTile + b * tile_pixels);
      }
    }
  });
}

template <class Segment>
void for_each_segment(const Noise& noise, const Shape& shape, int threads, Segment&& segment) {
  if (shape.batch * shape.sample() == 0) return;
  if (noise.seeds != nullptr) return for_each_drawn(noise, shape, threads, segment);
  const std::int64_t per_sample = (shape.sample() + kTile - 1) / kTile;
  const std::int64_t cost = shape.batch * shape.sample();
  for_each_tile(shape.batch * per_sample, cost, threads, [&](std::int64_t tile) {
    const std::int64_t offset = tile % per_sample * kTile;
    const auto n = static_cast<int>(std::min<std::int64_t>(kTile, shape.sample() - offset));
    segment(tile / per_sample, offset, n, nullptr);
  });
}

template <class A>
void linear_segment(const LinearStep& step, std::int64_t sample, std::int64_t offset, int n,
                    const float* z) {
  const auto m_count = static_cast<std::int64_t>(step.cond.size());
  const A* row = static_cast<const A*>(step.rows.data) + sample * step.row_stride;
  const A* uncond = row + 1;
  const A* cond = uncond + m_count;
  const A* noise_scale = cond + m_count;
  const A* x0_x = noise_scale + 1;  // clipped layout only, as all below
  const A* x0_uncond = x0_x + 1;
  const A* x0_cond = x0_uncond + m_count;
  const A* x0_scale = x0_cond + m_count;

  const std::int64_t at_offset = sample * step.shape.sample() + offset;
  A total[kTile], x_0[kTile];
  std::fill_n(total, n, A{0});
  add(total, row[0], step.x.data, step.x.dtype, at_offset, n);
  for (std::int64_t m = 0; m < m_count; ++m) {
    add(total, uncond[m], step.uncond[m], step.outputs_dtype, at_offset, n);
    add(total, cond[m], step.cond[m], step.outputs_dtype, at_offset, n);
    // an absent output has no x_0 prediction
    if (step.clipped && step.cond[m] != nullptr && x0_scale[m] != A{0}) {
      std::fill_n(x_0, n, A{0});
      add(x_0, x0_x[0], step.x.data, step.x.dtype, at_offset, n);
      add(x_0, x0_uncond[m], step.uncond[m], step.outputs_dtype, at_offset, n);
      add(x_0, x0_cond[m], step.cond[m], step.outputs_dtype, at_offset, n);
      add_clipped(total, x0_scale[m], x_0, static_cast<A>(step.clip_range), n);
    }
  }
  if (z != nullptr) {
    add(total, noise_scale[0], z, DType::kFloat32, 0, n);
  } else {
    add(total, noise_scale[0], step.noise.given.data, step.noise.given.dtype, at_offset, n);
  }
  write(step.out, at_offset, total, n);
}

// The numbers of objective m for n elements: the array itself, or `spread` filled with one value.
template <class A>
const A* table_values(const Table& table, std::int64_t m, std::int64_t sample, std::int64_t offset,
                      int n, A* spread) {
  const A* data = static_cast<const A*>(table.data) + m * table.objective_stride +
                  sample * table.sample_stride;
  if (table.pixelwise != 0) return data + offset;
  std::fill_n(spread, n, data[0]);
  return spread;
}

template <class A>
void moments_segment(const MomentsStep& step, std::int64_t sample, std::int64_t offset, int n,
                     const float* z) {
  const auto m_count = static_cast<std::int64_t>(step.means.size());
  const std::int64_t at_offset = sample * step.shape.sample() + offset;
  A least[kTile], precision[kTile], total[kTile], scaled[kTile], value[kTile];
  A spread_variance[kTile], spread_weight[kTile];
  const auto variance = [&](std::int64_t m) {
    return table_values(step.variances, m, sample, offset, n, spread_variance);
  };
  const auto weight = [&](std::int64_t m) {
    return table_values(step.weights, m, sample, offset, n, spread_weight);
  };
  const auto widen = [&](const void* data, DType dtype, std::int64_t from) {
    std::fill_n(value, n, A{0});
    add(value, A{1}, data, dtype, from, n);
  };
  std::fill_n(least, n, std::numeric_limits<A>::infinity());
  for (std::int64_t m = 0; m < m_count; ++m) fold_least(least, variance(m), weight(m), n);
  std::fill_n(precision, n, A{0});
  std::fill_n(total, n, A{0});
  for (std::int64_t m = 0; m < m_count; ++m) {
    scale_weights(scaled, precision, least, variance(m), weight(m), n);
    widen(step.means[m], step.means_dtype, at_offset);
    add_products(total, scaled, value, n);
  }
  normalise(total, least, precision, n);  // mean and variance from here on
  const DType wide = step.accumulate;
  if (step.mean != nullptr) write({step.mean, wide}, at_offset, total, n);
  if (step.variance != nullptr) write({step.variance, wide}, at_offset, least, n);
  square_root(least, n);
  if (z != nullptr) {
    widen(z, DType::kFloat32, 0);
    add_products(total, least, value, n);
  } else if (step.noise.given.data != nullptr) {
    widen(step.noise.given.data, step.noise.given.dtype, at_offset);
    add_products(total, least, value, n);
  }
  write(step.out, at_offset, total, n);
}

}  // namespace

void linear_step(const LinearStep& step) {
  for_each_segment(step.noise, step.shape, step.threads, [&](auto... where) {
    step.rows.dtype == DType::kFloat64 ? linear_segment<double>(step, where...)
                                       : linear_segment<float>(step, where...);
  });
}

void moments_step(const MomentsStep& step) {
  for_each_segment(step.noise, step.shape, step.threads, [&](auto... where) {
    step.accumulate == DType::kFloat64 ? moments_segment<double>(step, where...)
                                       : moments_segment<float>(step, where...);
  });
}

void counter_noise(Array out, const Noise& noise, const Shape& shape, int threads) {
  for_each_segment(noise, shape, threads, [&](auto sample, auto offset, int n, const float* z) {
    write(out, sample * shape.sample() + offset, z, n);
  });
}

}  // namespace msdda
