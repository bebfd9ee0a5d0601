// csrc/cuda/exit_head.cu on the host, with a CUDA runtime that notes what it is called with; LAUNCHER is the file,
// in which the test has replaced the launch by a call of `noted_launch`.
#include <cuda_runtime.h>

struct Noted {
  long long shared_limit, cleared, shared;
};

static Noted noted;
constexpr int kOptIn = 200 * 1024;

template <class Kernel, class... Arguments>
void noted_launch(Kernel, size_t shared, const Arguments&...) {
  noted.shared = static_cast<long long>(shared);
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int value) {
  noted.shared_limit = value;
  return cudaSuccess;
}

#include LAUNCHER

extern "C" {
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? kOptIn : 132;
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

// Float32 maps of 64×3×3.
const eefast::cuda::ExitHead* head(int size, int classes) {
  static eefast::cuda::ExitHead made;
  made = {};
  made.dtype = eefast::DType::float32;
  made.samples = made.size = size, made.channels = 64, made.height = made.width = 3;
  made.sample_stride = 576, made.channel_stride = 9, made.row_stride = 3, made.pixel_stride = 1;
  made.num_classes = classes;
  return &made;
}

const char* launch(const eefast::cuda::ExitHead* head, Noted* found) {
  noted = {};
  const char* const error = eefast::cuda::launch_exit_head(*head, 0, nullptr);
  *found = noted;
  return error;
}
}
