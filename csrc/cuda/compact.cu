// Queues the gather of the survivors' maps.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/compact.cuh"
#include "cuda/on_device.h"

namespace eefast::cuda {
namespace {

using Kernel = void (*)(Compact, CompactPieces);

template <class Unit>
__global__ void __launch_bounds__(CompactPieces::kThreads, 4)
    compact(const __grid_constant__ Compact compact, const __grid_constant__ CompactPieces pieces) {
  compact_kernel::run<Unit>(compact, pieces);
}

Kernel kernel_of(int unit) {
  switch (unit) {
    case 16: return compact<uint4>;
    case 8: return compact<uint2>;
    case 4: return compact<uint32_t>;
    case 2: return compact<uint16_t>;
    default: return compact<uint8_t>;
  }
}

cudaError_t launch(const Compact& compact, int device, cudaStream_t stream) {
  const CompactPieces pieces = pieces_of(compact);
  if (pieces.count == 0) return cudaSuccess;
  int processors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error) return error;
  // Enough to even out what blocks find to do, few enough that those behind the live rows do not show.
  const auto grid = static_cast<unsigned>(std::min<int64_t>(pieces.count, processors * 32));
  kernel_of(pieces.unit)<<<grid, CompactPieces::kThreads, 0, stream>>>(compact, pieces);
  return cudaGetLastError();
}

}  // namespace

const char* launch_compact(const Compact& compact, int device, void* stream) {
  return on_device(device, [&] { return launch(compact, device, static_cast<cudaStream_t>(stream)); });
}

}  // namespace eefast::cuda
