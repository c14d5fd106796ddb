// SPDX-License-Identifier: Apache-2.0
// A launch on a device that is not there throws, and leaves no error for the next launch to find.
//
// The CUDA runtime is played here: as the real one, it keeps the last error until it is asked for.
#include <cstdio>
#include <stdexcept>

#include "fused_step_cuda.h"

namespace {
int last_error = 0;
int invalid_device() { return last_error = 101; }
}  // namespace

extern "C" {
int cudaGetDevice(int* device) { return *device = 0; }
int cudaSetDevice(int) { return invalid_device(); }
int cudaDeviceGetAttribute(int* value, int, int) { return (*value = 1) - 1; }
int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}
const char* cudaGetErrorName(int) { return "name"; }
const char* cudaGetErrorString(int) { return "text"; }
// what nvcc adds for the kernels, which are not launched
int __cudaGetKernel(void*, const void*) { return 0; }
int __cudaLaunchKernel(void*, ...) { return 0; }
int __cudaLaunchKernel_ptsz(void*, ...) { return 0; }
int __cudaPopCallConfiguration(void*, ...) { return 0; }
unsigned __cudaPushCallConfiguration(...) { return 1; }
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaRegisterFunction(void**, ...) {}
void __cudaUnregisterFatBinary(void**) {}
}

int main() {
  bool thrown = false;
  try {
    msdda::launch(msdda::NoiseArguments{}, msdda::Queue{/*device=*/1, /*stream=*/nullptr});
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  std::printf("thrown=%d, error left: %d\n", thrown, last_error);
  return thrown && last_error == 0 ? 0 : 1;
}
