// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace msdda {

// Adds cuda_linear_step, cuda_moments_step and cuda_counter_noise.
void bind_cuda(pybind11::module_& module);

}  // namespace msdda
