// SPDX-License-Identifier: Apache-2.0
// Python passes addresses, dtype codes and sizes; msdda_fast/kernels/*/_native.py checks them and
// keeps the memory alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "fused_step_cpu.h"
#ifdef MSDDA_CUDA
#include "cuda_bindings.h"
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Pair = std::pair<Address, int>;  // address (0: absent) and dtype code
using Sizes = std::array<std::int64_t, 3>;
using Strided = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;  // a Table
// seeds (0: absent), step, stream
using Seeded = std::tuple<Address, std::uint32_t, std::uint32_t>;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

msdda::Array array(const Pair& pair) {
  return {pointer(pair.first), static_cast<msdda::DType>(pair.second)};
}

msdda::Noise noise_of(const Pair& given, const Seeded& seeded) {
  const auto& [seeds, step, stream] = seeded;
  return {array(given), static_cast<const std::int64_t*>(pointer(seeds)), step, stream};
}

msdda::Shape shape_of(const Sizes& sizes) { return {sizes[0], sizes[1], sizes[2]}; }

std::vector<const void*> pointers(const std::vector<Address>& addresses) {
  std::vector<const void*> result;
  for (const Address address : addresses) result.push_back(pointer(address));
  return result;
}

msdda::Table table(const Strided& strided) {
  const auto& [data, objective, sample, pixelwise] = strided;
  return {pointer(data), objective, sample, pixelwise};
}

void linear_step(const Pair& out, const Pair& x, const std::vector<Address>& uncond,
                 const std::vector<Address>& cond, int outputs_dtype, const Pair& rows,
                 std::int64_t row_stride, std::optional<double> clip_range, const Pair& noise,
                 const Seeded& seeded, const Sizes& sizes, int threads) {
  msdda::linear_step({array(out), array(x), pointers(uncond), pointers(cond),
                      static_cast<msdda::DType>(outputs_dtype), array(rows), row_stride,
                      clip_range.has_value(), clip_range.value_or(0.0), noise_of(noise, seeded),
                      shape_of(sizes), threads});
}

void moments_step(const Pair& out, const std::vector<Address>& means, int means_dtype,
                  const Strided& variances, const Strided& weights, int accumulate, Address mean,
                  Address variance, const Pair& noise, const Seeded& seeded, const Sizes& sizes,
                  int threads) {
  msdda::moments_step({array(out), pointers(means), static_cast<msdda::DType>(means_dtype),
                       table(variances), table(weights), static_cast<msdda::DType>(accumulate),
                       pointer(mean), pointer(variance), noise_of(noise, seeded), shape_of(sizes),
                       threads});
}

void counter_noise(const Pair& out, const Seeded& seeded, const Sizes& sizes, int threads) {
  msdda::counter_noise(array(out), noise_of({0, 0}, seeded), shape_of(sizes), threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels; see csrc/fused_step_cpu.h and csrc/cuda_bindings.cpp.";
  using NoGil = py::call_guard<py::gil_scoped_release>;
  module.def("linear_step", &linear_step, NoGil());
  module.def("moments_step", &moments_step, NoGil());
  module.def("counter_noise", &counter_noise, NoGil());
#ifdef MSDDA_CUDA
  msdda::bind_cuda(module);
  module.attr("cuda_built") = true;
#else
  module.attr("cuda_built") = false;
#endif
}
