// csrc/cuda/exit_head.cu or resident.cu on the host, with a CUDA runtime that notes what it is called with; LAUNCHER is
// the file, in which the test has replaced the launch by a call of `noted_launch`.
#include <cuda_runtime.h>

#include <algorithm>

struct Noted {
  long long shared_limit, cleared, shared, grid, asked, launches, most_shared;
};

static Noted noted;
constexpr int kOptIn = 200 * 1024;

template <class Kernel, class... Arguments>
void noted_launch(Kernel, int grid, size_t shared, const Arguments&...) {
  noted.grid = grid;
  noted.shared = static_cast<long long>(shared);
  noted.most_shared = std::max(noted.most_shared, noted.shared);
  ++noted.launches;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int value) {
  noted.shared_limit = value;
  ++noted.asked;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t bytes) {
  *blocks = static_cast<int>(kOptIn / bytes);
  ++noted.asked;
  return cudaSuccess;
}

#include LAUNCHER

extern "C" {
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? kOptIn : 132;
  ++noted.asked;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void*, int, size_t bytes, cudaStream_t) {
  noted.cleared = static_cast<long long>(bytes);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }

#ifdef RESIDENT
const char* launch(int images, int map_bytes, bool bfloat16, Noted* found) {
  static eefast::cuda::Job job;
  job.network.map_bytes = map_bytes, job.network.bfloat16 = bfloat16, job.batch.count = images;
  noted = {};
  const char* const error = eefast::cuda::launch_resident(job, 0, nullptr);
  *found = noted;
  return error;
}
#else
// Float32 maps of 64×3×3.
const char* launch(int size, int classes, Noted* found) {
  eefast::cuda::ExitHead head{};
  head.dtype = eefast::DType::float32;
  head.samples = head.size = size, head.channels = 64, head.height = head.width = 3;
  head.sample_stride = 576, head.channel_stride = 9, head.row_stride = 3, head.pixel_stride = 1;
  head.num_classes = classes;
  noted = {};
  const char* const error = eefast::cuda::launch_exit_head(head, 0, nullptr);
  *found = noted;
  return error;
}
#endif
}
