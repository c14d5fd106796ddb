// SPDX-License-Identifier: Apache-2.0
// The CUDA bindings with the GPU replaced by a loop: every work item of msdda/threads.h runs on the
// host, in reverse order, so that items that touch each other's elements would show.
#include <pybind11/pybind11.h>

#include "cuda_bindings.h"
#include "fused_step_cuda.h"
#include "msdda/threads.h"

namespace msdda {
namespace {

bool prefer_wide = true;
bool was_wide = false;

template <class Item>
void for_each_item(std::int64_t items, Item&& item) {
  while (items > 0) item(--items);
}

template <class A, int V, bool kClipped>
void linear(const LinearArguments& arguments) {
  for_each_item(arguments.extent.items(V), [&](std::int64_t item) {
    linear_thread<A, V, kClipped>(arguments, item);
  });
}

template <class A, int V>
void moments(const MomentsArguments& arguments) {
  for_each_item(arguments.extent.items(V),
                [&](std::int64_t item) { moments_thread<A, V>(arguments, item); });
}

}  // namespace

void launch(const LinearArguments& arguments, bool wide, bool double_precision, const Queue&) {
  was_wide = wide && prefer_wide && !double_precision && !arguments.clipped;
  if (was_wide) return linear<float, kLinearPixels, false>(arguments);
  if (double_precision) {
    return arguments.clipped ? linear<double, 1, true>(arguments)
                             : linear<double, 1, false>(arguments);
  }
  return arguments.clipped ? linear<float, 1, true>(arguments) : linear<float, 1, false>(arguments);
}

void launch(const MomentsArguments& arguments, bool wide, bool double_precision, const Queue&) {
  was_wide = wide && prefer_wide && !double_precision;
  if (was_wide) return moments<float, kMomentsPixels>(arguments);
  return double_precision ? moments<double, 1>(arguments) : moments<float, 1>(arguments);
}

void launch(const NoiseArguments& arguments, const Queue&) {
  for_each_item(arguments.extent.items(1),
                [&](std::int64_t item) { noise_thread(arguments, item); });
}

}  // namespace msdda

PYBIND11_MODULE(host_threads, module) {
  msdda::bind_cuda(module);
  module.def("prefer_wide", [](bool wide) { msdda::prefer_wide = wide; });
  module.def("was_wide", [] { return msdda::was_wide; });
}
