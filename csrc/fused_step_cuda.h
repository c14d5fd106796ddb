// SPDX-License-Identifier: Apache-2.0
// Starts the kernels on a stream of a device; returns before they have run.
#pragma once

#include "msdda/arguments.h"

namespace msdda {

// Pixels of a thread where 16-byte accesses are possible and the problem fills the GPU.
constexpr int kLinearPixels = 8;
constexpr int kMomentsPixels = 4;  // five tiles in registers instead of three

struct Queue {
  int device;    // as CUDA counts them
  void* stream;  // a cudaStream_t
};

// `wide`: sizes and addresses allow the wide kernel; see cuda_bindings.cpp. Each throws
// std::runtime_error with the name of the CUDA error.
void launch(const LinearArguments& arguments, bool wide, bool double_precision, const Queue& queue);
void launch(const MomentsArguments& arguments, bool wide, bool double_precision,
            const Queue& queue);
void launch(const NoiseArguments& arguments, const Queue& queue);

}  // namespace msdda
