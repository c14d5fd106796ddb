// SPDX-License-Identifier: Apache-2.0
// One GPU thread of each operator: reads its tile of every input once, writes its tile of the
// results once. Order of operations and masks: msdda/fused_step.h.
//
// A tile is one work item; the kernels in fused_step_cuda.cu and the test on the host only loop
// over items. V = 1 suits any size, any alignment and small problems, where what counts is how many
// threads wait at a time; V > 1 moves 16 bytes an instruction and needs what `View` says.
#pragma once

#include <cmath>

#include "msdda/arguments.h"
#include "msdda/fused_step.h"
#include "msdda/normal.h"
#include "msdda/tile.h"

namespace msdda {

template <int V>
MSDDA_HD Place place_of(const Extent& extent, std::int64_t item) {
  const std::int64_t groups = extent.pixels / V, plane = item / groups, blocks = extent.blocks();
  const std::int64_t sample = plane / blocks, channel = (plane - sample * blocks) * kChannels;
  const std::int64_t left = extent.channels - channel;
  return {sample, channel, (item - plane * groups) * V,
          left < kChannels ? static_cast<int>(left) : kChannels};
}

template <class A, int V>
MSDDA_HD void fill(Tile<A, V>& tile, A value) {
  MSDDA_UNROLL
  for (int i = 0; i < kChannels; ++i) {
    MSDDA_UNROLL
    for (int v = 0; v < V; ++v) tile.at[i][v] = value;
  }
}

// The load does not wait for the coefficient: a masked value is read and dropped.
template <class A, int V>
MSDDA_HD void add(Tile<A, V>& total, A coefficient, const Tile<A, V>& value) {
  MSDDA_UNROLL
  for (int i = 0; i < kChannels; ++i) {
    MSDDA_UNROLL
    for (int v = 0; v < V; ++v) {
      total.at[i][v] = add_term(total.at[i][v], coefficient, value.at[i][v]);
    }
  }
}

// f(v, i, z) with the noise of pixel place.pixel + v in channel place.channel + i.
template <int V, class F>
MSDDA_HD void draw(const Place& place, std::int64_t seed, std::int64_t step, std::uint32_t stream,
                   F&& f) {
  const auto block = static_cast<std::uint32_t>(place.channel / kChannels);
  const auto key = static_cast<std::uint64_t>(seed);
  MSDDA_UNROLL
  for (int v = 0; v < V; ++v) {
    const Words words =
        philox({static_cast<std::uint32_t>(place.pixel + v), block,
                static_cast<std::uint32_t>(step), stream},
               static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32));
    const NormalPair first = standard_normals(words.w0, words.w1);
    const NormalPair second = standard_normals(words.w2, words.w3);
    f(v, 0, first.x);
    f(v, 1, first.y);
    f(v, 2, second.x);
    f(v, 3, second.y);
  }
}

// total += scale(i, v) * z, whatever the source
template <class A, int V, class Scale>
MSDDA_HD void add_noise(Tile<A, V>& total, const NoiseSource& noise, const Place& place,
                        std::int64_t step, Scale&& scale) {
  if (noise.seeds != nullptr) {
    draw<V>(place, noise.seeds[place.sample], step, noise.stream, [&](int v, int i, float z) {
      total.at[i][v] = add_term(total.at[i][v], scale(i, v), static_cast<A>(z));
    });
  } else if (noise.given.data != nullptr) {
    Tile<A, V> z = {};
    const std::int64_t offset = step * noise.given_step + noise.given.offset(place);
    read(z, noise.given, offset, place.channels);
    MSDDA_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      MSDDA_UNROLL
      for (int v = 0; v < V; ++v) {
        total.at[i][v] = add_term(total.at[i][v], scale(i, v), z.at[i][v]);
      }
    }
  }
}

// The terms of every objective; T is the type of the network outputs.
template <class T, class A, int V, bool kClipped>
MSDDA_HD void add_outputs(Tile<A, V>& total, const LinearArguments& p, const Place& place,
                          const Tile<A, V>& x, const A* row) {
  const std::int64_t count = p.objectives, offset = p.outputs.offset(place);
  const A* x0_row = row + 2 * count + 2;  // clipped layout only
  for (std::int64_t m = 0; m < count; ++m) {
    if (p.cond[m] == nullptr) continue;
    const bool guided = p.uncond[m] != nullptr;
    Tile<A, V> uncond = {}, cond = {};
    // without guidance the conditional half is read twice, the second time from the cache: no
    // branch keeps the loads apart
    const void* first = guided ? p.uncond[m] : p.cond[m];
    read_tile(uncond, static_cast<const T*>(first) + offset, p.outputs, place.channels);
    read_tile(cond, static_cast<const T*>(p.cond[m]) + offset, p.outputs, place.channels);
    add(total, guided ? row[1 + m] : A{0}, uncond);
    add(total, row[1 + count + m], cond);
    if constexpr (kClipped) {
      const A range = static_cast<A>(p.clip_range), x0_scale = row[4 * count + 3 + m];
      Tile<A, V> x_0;
      fill(x_0, A{0});
      add(x_0, x0_row[0], x);
      add(x_0, guided ? x0_row[1 + m] : A{0}, uncond);
      add(x_0, x0_row[1 + count + m], cond);
      MSDDA_UNROLL
      for (int i = 0; i < kChannels; ++i) {
        MSDDA_UNROLL
        for (int v = 0; v < V; ++v) x_0.at[i][v] = clamp_symmetric(x_0.at[i][v], range);
      }
      add(total, x0_scale, x_0);
    }
  }
}

template <class A, int V, bool kClipped>
MSDDA_HD void linear_thread(const LinearArguments& p, std::int64_t item) {
  const Place place = place_of<V>(p.extent, item);
  const std::int64_t step = p.step.now();
  const A* row =
      static_cast<const A*>(p.rows) + step * p.row_step + place.sample * p.row_sample;
  Tile<A, V> total, x = {};
  fill(total, A{0});
  if (p.x.data != nullptr) {
    read(x, p.x, p.x.offset(place), place.channels);
    add(total, row[0], x);
  }
  switch (p.outputs.dtype) {
    case DType::kFloat32: add_outputs<float, A, V, kClipped>(total, p, place, x, row); break;
    case DType::kFloat64: add_outputs<double, A, V, kClipped>(total, p, place, x, row); break;
    case DType::kBFloat16: add_outputs<BFloat16, A, V, kClipped>(total, p, place, x, row); break;
    case DType::kFloat16: add_outputs<Float16, A, V, kClipped>(total, p, place, x, row); break;
  }
  const A noise_scale = row[2 * p.objectives + 1];
  if (noise_scale != A{0}) {
    add_noise(total, p.noise, place, step, [&](int, int) { return noise_scale; });
  }
  write(p.out, p.out.offset(place), total, place.channels);
  if (p.next.data != nullptr) {
    round_as(total, p.out.dtype);  // the network sees the state as it was stored
    const std::int64_t offset = p.next.offset(place);
    for (std::int64_t copy = 0; copy < p.copies; ++copy) {
      write(p.next, copy * p.copy_stride + offset, total, place.channels);
    }
  }
}

// The numbers of objective m, where absent channels keep what is in the tile.
template <class A, int V>
MSDDA_HD void read_numbers(Tile<A, V>& tile, const Numbers& numbers, std::int64_t m,
                           const Place& place) {
  const A* from = static_cast<const A*>(numbers.data) + m * numbers.objective +
                  place.sample * numbers.sample + place.channel * numbers.channel +
                  place.pixel * numbers.pixel;
  MSDDA_UNROLL
  for (int i = 0; i < kChannels; ++i) {
    if (i >= place.channels) continue;
    if (numbers.pixel != 0) {
      read_run<V>(tile.at[i], 1, from + i * numbers.channel);
    } else {
      MSDDA_UNROLL
      for (int v = 0; v < V; ++v) tile.at[i][v] = from[i * numbers.channel];
    }
  }
}

// The second pass over variances and weights finds them in the first-level cache.
template <class A, int V>
MSDDA_HD void moments_thread(const MomentsArguments& p, std::int64_t item) {
  const Place place = place_of<V>(p.extent, item);
  Tile<A, V> least, total, precision, variance = {}, weight = {};
  fill(least, static_cast<A>(INFINITY));
  fill(total, A{0});
  fill(precision, A{0});
  for (std::int64_t m = 0; m < p.objectives; ++m) {
    read_numbers(variance, p.variances, m, place);
    read_numbers(weight, p.weights, m, place);
    MSDDA_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      MSDDA_UNROLL
      for (int v = 0; v < V; ++v) {
        least.at[i][v] = least_variance(least.at[i][v], variance.at[i][v], weight.at[i][v]);
      }
    }
  }
  View means = p.means;
  for (std::int64_t m = 0; m < p.objectives; ++m) {
    Tile<A, V> mean = {};
    means.data = const_cast<void*>(p.mean_of[m]);
    read(mean, means, means.offset(place), place.channels);
    read_numbers(variance, p.variances, m, place);
    read_numbers(weight, p.weights, m, place);
    MSDDA_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      MSDDA_UNROLL
      for (int v = 0; v < V; ++v) {
        const A scaled = scaled_weight(least.at[i][v], variance.at[i][v], weight.at[i][v]);
        precision.at[i][v] = precision.at[i][v] + scaled;
        total.at[i][v] = add_term(total.at[i][v], scaled, mean.at[i][v]);
      }
    }
  }
  MSDDA_UNROLL
  for (int i = 0; i < kChannels; ++i) {
    MSDDA_UNROLL
    for (int v = 0; v < V; ++v) {
      total.at[i][v] = total.at[i][v] / precision.at[i][v];
      least.at[i][v] = least.at[i][v] / precision.at[i][v];
    }
  }
  if (p.mean.data != nullptr) write(p.mean, p.mean.offset(place), total, place.channels);
  if (p.variance.data != nullptr) {
    write(p.variance, p.variance.offset(place), least, place.channels);
  }
  add_noise(total, p.noise, place, p.step.now(),
            [&](int i, int v) { return std::sqrt(least.at[i][v]); });
  write(p.out, p.out.offset(place), total, place.channels);
}

MSDDA_HD void noise_thread(const NoiseArguments& p, std::int64_t item) {
  const Place place = place_of<1>(p.extent, item);
  Tile<float, 1> z;
  draw<1>(place, p.seeds[place.sample], p.step.now(), p.stream,
          [&](int v, int i, float value) { z.at[i][v] = value; });
  write(p.out, p.out.offset(place), z, place.channels);
}

}  // namespace msdda
