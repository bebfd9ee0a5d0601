// Queues the exit head: one memset of four bytes, then one launch.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/exit_head.cuh"
#include "cuda/on_device.h"

namespace eefast::cuda {
namespace {

using Kernel = void (*)(ExitHead, ExitHeadTiles);

// Four blocks of 256 threads leave 64 registers each, three leave 80.
template <class T, int VECTOR, int ROWS, bool CARRIES>
__global__ void __launch_bounds__(ExitHeadTiles::kThreads, ROWS == 1 ? 4 : 3)
    exit_head(const __grid_constant__ ExitHead head, const __grid_constant__ ExitHeadTiles tiles) {
  extern __shared__ __align__(16) char shared[];
  exit_head_kernel::run<T, VECTOR, ROWS, CARRIES>(head, tiles, shared);
}

template <class T, bool CARRIES>
Kernel kernel_of(const ExitHeadTiles& tiles) {
  constexpr int kWide = 16 / sizeof(T), kRows = ExitHeadTiles::kManyRows;
  if (tiles.many_classes) return tiles.wide ? exit_head<T, kWide, kRows, CARRIES> : exit_head<T, 1, kRows, CARRIES>;
  return tiles.wide ? exit_head<T, kWide, 1, CARRIES> : exit_head<T, 1, 1, CARRIES>;
}

template <bool CARRIES>
Kernel kernel_of(DType dtype, const ExitHeadTiles& tiles) {
  if (dtype == DType::float32) return kernel_of<float, CARRIES>(tiles);
  return dtype == DType::float16 ? kernel_of<__half, CARRIES>(tiles) : kernel_of<__nv_bfloat16, CARRIES>(tiles);
}

cudaError_t launch(const ExitHead& head, int device, cudaStream_t stream) {
  const ExitHeadTiles tiles = tiles_of(head);
  const Kernel kernel = head.rule ? kernel_of<true>(head.dtype, tiles) : kernel_of<false>(head.dtype, tiles);
  const auto bytes = static_cast<int>(tiles.shared_bytes);
  int processors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (!error && bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (!error) error = cudaMemsetAsync(head.workspace, 0, sizeof(int32_t), stream);
  if (error) return error;
  // More blocks than a device can hold would only take more tickets.
  const int grid = std::clamp(tiles.count, 1, processors * 8);
  kernel<<<grid, ExitHeadTiles::kThreads, bytes, stream>>>(head, tiles);
  return cudaGetLastError();
}

}  // namespace

const char* launch_exit_head(const ExitHead& head, int device, void* stream) {
  return on_device(device, [&] { return launch(head, device, static_cast<cudaStream_t>(stream)); });
}

}  // namespace eefast::cuda
