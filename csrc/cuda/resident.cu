// Queues the resident kernel: as many blocks as the device holds at once, or one per image if those are fewer.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/resident.cuh"
#include "cuda/on_device.h"

namespace eefast::cuda {
namespace {

// Two blocks of 256 threads leave 128 registers each. sm_86 and sm_89 have shared memory for one block only.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1200)
constexpr int kBlocks = 1;
#else
constexpr int kBlocks = 2;
#endif

template <class T, bool CARRIES>
__global__ void __launch_bounds__(kThreads, kBlocks) resident_kernel(const __grid_constant__ Job job) {
  extern __shared__ __align__(128) char shared[];
  resident<T, CARRIES>(job, shared);
}

template <bool CARRIES>
auto kernel_of(bool bfloat16) {
  return bfloat16 ? resident_kernel<__nv_bfloat16, CARRIES> : resident_kernel<__half, CARRIES>;
}

// How many blocks a device holds at once. To ask takes as long as the launch: a thread asks when its kernel changes.
template <class Kernel>
cudaError_t blocks_of(Kernel kernel, int bytes, int device, int* blocks) {
  struct Known {
    Kernel kernel;
    int bytes, device, blocks;
  };
  static thread_local Known known{};
  if (known.kernel != kernel || known.bytes != bytes || known.device != device) {
    int processors = 0, most = 0, per_processor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, bytes);
    if (!error && per_processor == 0) error = cudaErrorLaunchOutOfResources;
    if (error) return error;
    known = {kernel, bytes, device, processors * per_processor};
  }
  *blocks = known.blocks;
  return cudaSuccess;
}

cudaError_t launch(const Job& job, int device, cudaStream_t stream) {
  const Network& network = job.network;
  const Batch& batch = job.batch;
  const auto kernel = network.rule ? kernel_of<true>(network.bfloat16) : kernel_of<false>(network.bfloat16);
  const auto bytes = static_cast<int>(shared_bytes(network));
  int blocks = 0;
  cudaError_t error = blocks_of(kernel, bytes, device, &blocks);
  if (!error) error = cudaMemsetAsync(batch.next, 0, sizeof(int), stream);
  if (error) return error;
  const int grid = std::min(blocks, batch.count);
  kernel<<<grid, kThreads, bytes, stream>>>(job);
  return cudaGetLastError();
}

}  // namespace

const char* launch_resident(const Job& job, int device, void* stream) {
  return on_device(device, [&] { return launch(job, device, static_cast<cudaStream_t>(stream)); });
}

}  // namespace eefast::cuda
