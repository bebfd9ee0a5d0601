// Calls a launcher with a device as the current one, and puts the one before back.
#pragma once

#include <cuda_runtime.h>

namespace eefast::cuda {

// Null, or what went wrong.
template <class Launch>
const char* on_device(int device, Launch launch) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (!error && before != device) error = cudaSetDevice(device);
  if (!error) error = launch();
  if (before != device) cudaSetDevice(before);
  return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace eefast::cuda
