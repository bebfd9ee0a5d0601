// Queues the exit head: one memset, then one launch, with many classes three.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/exit_head.cuh"
#include "cuda/on_device.h"

namespace eefast::cuda {
namespace {

using Kernel = void (*)(ExitHead, ExitHeadTiles);

// Four blocks of 256 threads leave 64 registers each, three leave 80. For sm_86 and sm_89 the compiler needs a few more
// than 64.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
constexpr int kBlocks = 3;
#else
constexpr int kBlocks = 4;
#endif

template <class T, int VECTOR, bool CARRIES>
__global__ void __launch_bounds__(ExitHeadTiles::kThreads, kBlocks)
    exit_head(const __grid_constant__ ExitHead head, const __grid_constant__ ExitHeadTiles tiles) {
  extern __shared__ __align__(16) char shared[];
  exit_head_kernel::run<T, VECTOR, CARRIES>(head, tiles, shared);
}

template <class T, int VECTOR>
__global__ void __launch_bounds__(ExitHeadTiles::kThreads, 3)
    exit_head_pool(const __grid_constant__ ExitHead head, const __grid_constant__ ExitHeadTiles tiles) {
  extern __shared__ __align__(16) char shared[];
  exit_head_kernel::pool<T, VECTOR>(head, tiles, shared);
}

__global__ void __launch_bounds__(ExitHeadTiles::kThreads, 3)
    exit_head_classify(const __grid_constant__ ExitHead head, const __grid_constant__ ExitHeadTiles tiles) {
  extern __shared__ __align__(16) char shared[];
  exit_head_kernel::classify(head, tiles, shared);
}

template <bool CARRIES>
__global__ void __launch_bounds__(ExitHeadTiles::kThreads, 4)
    exit_head_decide(const __grid_constant__ ExitHead head, const __grid_constant__ ExitHeadTiles tiles) {
  extern __shared__ __align__(16) char shared[];
  exit_head_kernel::decide<CARRIES>(head, tiles, shared);
}

// The kernel that reads the maps: of few classes, or the first of many.
template <class T>
Kernel kernel_of(const ExitHead& head, const ExitHeadTiles& tiles) {
  constexpr int kWide = 16 / sizeof(T);
  if (tiles.many_classes) return tiles.wide ? exit_head_pool<T, kWide> : exit_head_pool<T, 1>;
  if (head.rule) return tiles.wide ? exit_head<T, kWide, true> : exit_head<T, 1, true>;
  return tiles.wide ? exit_head<T, kWide, false> : exit_head<T, 1, false>;
}

Kernel kernel_of(const ExitHead& head, const ExitHeadTiles& tiles) {
  if (head.dtype == DType::float32) return kernel_of<float>(head, tiles);
  return head.dtype == DType::float16 ? kernel_of<__half>(head, tiles) : kernel_of<__nv_bfloat16>(head, tiles);
}

cudaError_t launch(const ExitHead& head, int device, cudaStream_t stream) {
  const ExitHeadTiles tiles = tiles_of(head);
  const Kernel first = kernel_of(head, tiles);
  int processors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  // The flags too, of which the kernel reads whole words.
  const size_t words = ExitHead::workspace_words(head.size);
  if (!error) error = cudaMemsetAsync(head.workspace, 0, words * sizeof(int32_t), stream);
  if (error) return error;
  const auto queue = [&](Kernel kernel, int64_t blocks, size_t bytes) {
    // More blocks than a device can hold would only take more tickets.
    const int grid = static_cast<int>(std::clamp<int64_t>(blocks, 1, processors * 8));
    kernel<<<grid, ExitHeadTiles::kThreads, bytes, stream>>>(head, tiles);
    return cudaGetLastError();
  };
  if (!tiles.many_classes) return queue(first, tiles.count, tiles.shared_bytes);
  error = queue(first, head.size * tiles.blocks_per_sample, tiles.pool_bytes);
  if (!error) error = queue(exit_head_classify, int64_t{tiles.count} * tiles.class_blocks, tiles.classify_bytes);
  if (error) return error;
  return queue(head.rule ? exit_head_decide<true> : exit_head_decide<false>, tiles.count, tiles.shared_bytes);
}

}  // namespace

const char* launch_exit_head(const ExitHead& head, int device, void* stream) {
  return on_device(device, [&] { return launch(head, device, static_cast<cudaStream_t>(stream)); });
}

}  // namespace eefast::cuda
