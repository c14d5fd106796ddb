// SPDX-License-Identifier: Apache-2.0
// One launch per operator: loops over the work items of msdda/threads.h.
#include "fused_step_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "msdda/threads.h"

namespace msdda {
namespace {

constexpr int kBlock = 128;  // small: a 64 x 64 latent is 4096 items, on 32 processors
constexpr int kBlocksEach = 64;  // per multiprocessor, at most; beyond that threads loop

template <class A, int V, bool kClipped>
__global__ void __launch_bounds__(kBlock)
    linear_kernel(const __grid_constant__ LinearArguments arguments, std::int64_t items) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kBlock;
  for (auto item = std::int64_t{blockIdx.x} * kBlock + threadIdx.x; item < items; item += stride) {
    linear_thread<A, V, kClipped>(arguments, item);
  }
}

template <class A, int V>
__global__ void __launch_bounds__(kBlock)
    moments_kernel(const __grid_constant__ MomentsArguments arguments, std::int64_t items) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kBlock;
  for (auto item = std::int64_t{blockIdx.x} * kBlock + threadIdx.x; item < items; item += stride) {
    moments_thread<A, V>(arguments, item);
  }
}

__global__ void __launch_bounds__(kBlock)
    noise_kernel(const __grid_constant__ NoiseArguments arguments, std::int64_t items) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kBlock;
  for (auto item = std::int64_t{blockIdx.x} * kBlock + threadIdx.x; item < items; item += stride) {
    noise_thread(arguments, item);
  }
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next launch asks for the last error, and it is not that one's
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

// Makes a device current, and the one that was current again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

template <class Arguments>
void start(void (*kernel)(Arguments, std::int64_t), const Arguments& arguments, std::int64_t items,
           int processors, const Queue& queue, const char* name) {
  const std::int64_t blocks = std::min<std::int64_t>((items + kBlock - 1) / kBlock,
                                                     std::int64_t{processors} * kBlocksEach);
  kernel<<<static_cast<unsigned>(blocks), kBlock, 0, static_cast<cudaStream_t>(queue.stream)>>>(
      arguments, items);
  // resets the error, too: this copy of the CUDA runtime is ours alone
  check(cudaGetLastError(), name);
}

// Whether wide items alone give every multiprocessor two blocks; below that, more threads that
// wait for memory at a time are worth more than fewer instructions.
bool fills(std::int64_t wide_items, int processors) {
  return wide_items >= std::int64_t{processors} * 2 * kBlock;
}

template <class A, bool kClipped>
void launch_linear(const LinearArguments& arguments, bool wide, const Queue& queue) {
  const int processors = multiprocessors(queue.device);
  // eight pixels of doubles, or of clipping with its x_0, would not fit in registers; one pixel
  // per thread is coalesced, too
  if constexpr (sizeof(A) == 4 && !kClipped) {
    const std::int64_t items = arguments.extent.items(kLinearPixels);
    if (wide && fills(items, processors)) {
      return start(linear_kernel<A, kLinearPixels, kClipped>, arguments, items, processors, queue,
                   "linear_kernel");
    }
  }
  start(linear_kernel<A, 1, kClipped>, arguments, arguments.extent.items(1), processors, queue,
        "linear_kernel");
}

}  // namespace

void launch(const LinearArguments& arguments, bool wide, bool double_precision,
            const Queue& queue) {
  const DeviceGuard guard(queue.device);
  if (double_precision) {
    arguments.clipped ? launch_linear<double, true>(arguments, wide, queue)
                      : launch_linear<double, false>(arguments, wide, queue);
  } else {
    arguments.clipped ? launch_linear<float, true>(arguments, wide, queue)
                      : launch_linear<float, false>(arguments, wide, queue);
  }
}

void launch(const MomentsArguments& arguments, bool wide, bool double_precision,
            const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const int processors = multiprocessors(queue.device);
  const std::int64_t narrow = arguments.extent.items(1);
  const std::int64_t items = arguments.extent.items(kMomentsPixels);
  if (double_precision) {
    start(moments_kernel<double, 1>, arguments, narrow, processors, queue, "moments_kernel");
  } else if (wide && fills(items, processors)) {
    start(moments_kernel<float, kMomentsPixels>, arguments, items, processors, queue,
          "moments_kernel");
  } else {
    start(moments_kernel<float, 1>, arguments, narrow, processors, queue, "moments_kernel");
  }
}

void launch(const NoiseArguments& arguments, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  start(noise_kernel, arguments, arguments.extent.items(1), multiprocessors(queue.device), queue,
        "noise_kernel");
}

}  // namespace msdda
