// Queues the gather of the survivors' maps.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/gather_survivors.cuh"
#include "cuda/on_device.h"

namespace eefast::cuda {
namespace {

using Kernel = void (*)(Gather, GatherPieces);

template <class Unit>
__global__ void __launch_bounds__(GatherPieces::kThreads, 4)
    gather_survivors(const __grid_constant__ Gather gather, const __grid_constant__ GatherPieces pieces) {
  gather_kernel::run<Unit>(gather, pieces);
}

Kernel kernel_of(int unit) {
  switch (unit) {
    case 16: return gather_survivors<uint4>;
    case 8: return gather_survivors<uint2>;
    case 4: return gather_survivors<uint32_t>;
    case 2: return gather_survivors<uint16_t>;
    default: return gather_survivors<uint8_t>;
  }
}

cudaError_t launch(const Gather& gather, int device, cudaStream_t stream) {
  const GatherPieces pieces = pieces_of(gather);
  if (pieces.count == 0) return cudaSuccess;
  int processors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error) return error;
  // Enough to even out what blocks find to do, few enough that those beyond the live rows cost nothing.
  const auto grid = static_cast<unsigned>(std::min<int64_t>(pieces.count, processors * 32));
  kernel_of(pieces.unit)<<<grid, GatherPieces::kThreads, 0, stream>>>(gather, pieces);
  return cudaGetLastError();
}

}  // namespace

const char* launch_gather_survivors(const Gather& gather, int device, void* stream) {
  return on_device(device, [&] { return launch(gather, device, static_cast<cudaStream_t>(stream)); });
}

}  // namespace eefast::cuda
