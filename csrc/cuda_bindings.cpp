// SPDX-License-Identifier: Apache-2.0
// Python passes addresses, dtype codes, strides and sizes; msdda_fast/kernels/*/_native.py checks
// them. Memory is kept alive by the stream order of torch's allocator.
#include "cuda_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "fused_step_cuda.h"

namespace py = pybind11;

namespace {

using msdda::Extent;
using msdda::NoiseSource;
using msdda::View;

using Address = std::uintptr_t;
using Strided = std::tuple<Address, int, std::int64_t, std::int64_t>;  // + strides of (C, P)
using Copies = std::tuple<Strided, std::int64_t, std::int64_t>;       // number, stride
using Rows = std::tuple<Address, int, std::int64_t, std::int64_t>;    // strides of (T, B)
using Given = std::pair<Strided, std::int64_t>;                       // stride of T
using Seeded = std::pair<Address, std::uint32_t>;                     // seeds, stream
using Step = std::pair<Address, std::int64_t>;                        // address or 0, value
using Table = std::array<std::int64_t, 5>;  // address, strides of (M, B, C, P)
using Sizes = std::array<std::int64_t, 3>;
using Queue = std::pair<int, Address>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

std::int64_t item_size(msdda::DType dtype) {
  switch (dtype) {
    case msdda::DType::kFloat32: return 4;
    case msdda::DType::kFloat64: return 8;
    default: return 2;
  }
}

// Describes tensors to the kernels, and finds out whether the wide one can take them all: that
// needs `pixels_each` neighbouring pixels at 16-byte boundaries.
class Layout {
 public:
  Layout(const Sizes& sizes, int pixels_each)
      : extent_{sizes[0], sizes[1], sizes[2]}, wide_(sizes[2] % pixels_each == 0) {}

  const Extent& extent() const { return extent_; }
  bool wide() const { return wide_; }

  View view(const Strided& strided) {
    return std::get<0>(strided) == 0 ? View{} : view(strided, {std::get<0>(strided)}, 0);
  }

  // Tensors of one layout that begin at `addresses`, and further ones `period` elements apart
  View view(const Strided& strided, const std::vector<Address>& addresses, std::int64_t period) {
    const View view = make(strided, addresses, period);
    wide_ = wide_ && !view.grouped;
    return view;
  }

  // An output that the wide kernel writes in either layout
  View written(const Strided& strided, std::int64_t period) {
    return std::get<0>(strided) == 0 ? View{} : make(strided, {std::get<0>(strided)}, period);
  }

  msdda::Numbers numbers(const Table& table) {
    const auto address = static_cast<Address>(table[0]);
    wide_ = wide_ && (table[4] == 0 || address % 16 == 0);
    return {pointer<void>(address), table[1], table[2], table[3], table[4]};
  }

  NoiseSource noise(const Given& given, const Seeded& seeded) {
    const auto& [strided, period] = given;
    const Address address = std::get<0>(strided);
    return {address == 0 ? View{} : view(strided, {address}, period), period,
            pointer<std::int64_t>(seeded.first), seeded.second};
  }

 private:
  View make(const Strided& strided, const std::vector<Address>& addresses, std::int64_t period) {
    const auto& [address, code, channel, pixel] = strided;
    View view{pointer<void>(address), static_cast<msdda::DType>(code), false,
              extent_.channels * extent_.pixels, channel, pixel};
    const std::int64_t size = item_size(view.dtype), group = std::min<std::int64_t>(4 * size, 16);
    const auto all_aligned = [&](std::int64_t bytes) {
      bool result = period * size % bytes == 0;
      for (const Address a : addresses) result = result && a % static_cast<Address>(bytes) == 0;
      return result;
    };
    view.grouped = channel == 1 && extent_.channels % msdda::kChannels == 0 && all_aligned(group);
    wide_ = wide_ && (view.grouped || (pixel == 1 && all_aligned(16)));
    return view;
  }

  Extent extent_;
  bool wide_;
};

msdda::Counter counter(const Step& step) {
  return {pointer<std::int64_t>(step.first), step.second};
}

msdda::Queue queue_of(const Queue& queue) { return {queue.first, pointer<void>(queue.second)}; }

void check_count(std::size_t objectives) {
  if (objectives > msdda::kMaxObjectives) throw std::length_error("too many objectives");
}

void linear_step(const Strided& out, const Strided& x, const Copies& next,
                 const Strided& outputs, const std::vector<Address>& uncond,
                 const std::vector<Address>& cond, const Rows& rows,
                 std::optional<double> clip_range, const Given& noise, const Seeded& seeded,
                 const Step& step, const Sizes& sizes, const Queue& queue) {
  check_count(cond.size());
  Layout layout(sizes, msdda::kLinearPixels);
  msdda::LinearArguments arguments{};
  arguments.extent = layout.extent();
  if (arguments.extent.items(1) == 0) return;
  arguments.step = counter(step);
  arguments.out = layout.view(out);
  arguments.x = layout.view(x);
  const auto& [next_view, copies, copy_stride] = next;
  arguments.next = layout.written(next_view, copy_stride);
  arguments.copies = copies;
  arguments.copy_stride = copy_stride;
  std::vector<Address> present;
  for (std::size_t m = 0; m < cond.size(); ++m) {
    arguments.uncond[m] = pointer<void>(uncond[m]);
    arguments.cond[m] = pointer<void>(cond[m]);
    if (uncond[m] != 0) present.push_back(uncond[m]);
    if (cond[m] != 0) present.push_back(cond[m]);
  }
  if (!present.empty()) arguments.outputs = layout.view(outputs, present, 0);
  arguments.objectives = static_cast<int>(cond.size());
  const auto& [row_address, row_dtype, row_step, row_sample] = rows;
  arguments.rows = pointer<void>(row_address);
  arguments.row_step = row_step;
  arguments.row_sample = row_sample;
  arguments.clipped = clip_range.has_value();
  arguments.clip_range = clip_range.value_or(0.0);
  arguments.noise = layout.noise(noise, seeded);
  const bool wide_numbers = static_cast<msdda::DType>(row_dtype) == msdda::DType::kFloat64;
  msdda::launch(arguments, layout.wide(), wide_numbers, queue_of(queue));
}

void moments_step(const Strided& out, const Strided& means, const std::vector<Address>& addresses,
                  const Table& variances, const Table& weights, int accumulate,
                  const Strided& mean, const Strided& variance, const Given& noise,
                  const Seeded& seeded, const Step& step, const Sizes& sizes, const Queue& queue) {
  check_count(addresses.size());
  Layout layout(sizes, msdda::kMomentsPixels);
  msdda::MomentsArguments arguments{};
  arguments.extent = layout.extent();
  if (arguments.extent.items(1) == 0) return;
  arguments.step = counter(step);
  arguments.out = layout.view(out);
  arguments.mean = layout.view(mean);
  arguments.variance = layout.view(variance);
  arguments.variances = layout.numbers(variances);
  arguments.weights = layout.numbers(weights);
  arguments.noise = layout.noise(noise, seeded);
  arguments.means = layout.view(means, addresses, 0);
  arguments.objectives = static_cast<int>(addresses.size());
  for (std::size_t m = 0; m < addresses.size(); ++m) {
    arguments.mean_of[m] = pointer<void>(addresses[m]);
  }
  const bool wide_numbers = static_cast<msdda::DType>(accumulate) == msdda::DType::kFloat64;
  msdda::launch(arguments, layout.wide(), wide_numbers, queue_of(queue));
}

void counter_noise(const Strided& out, const Seeded& seeded, const Step& step, const Sizes& sizes,
                   const Queue& queue) {
  Layout layout(sizes, 1);
  msdda::NoiseArguments arguments{layout.extent(), counter(step), layout.view(out),
                                  pointer<std::int64_t>(seeded.first), seeded.second};
  if (arguments.extent.items(1) == 0) return;
  msdda::launch(arguments, queue_of(queue));
}

}  // namespace

namespace msdda {

void bind_cuda(py::module_& module) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  module.attr("cuda_max_objectives") = kMaxObjectives;
  module.def("cuda_linear_step", &linear_step, NoGil());
  module.def("cuda_moments_step", &moments_step, NoGil());
  module.def("cuda_counter_noise", &counter_noise, NoGil());
}

}  // namespace msdda
