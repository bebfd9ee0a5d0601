// The stream on which PyTorch queues work of a CUDA device now.
#include "current_stream.h"

#include <dlfcn.h>

#include "checks.h"

namespace eefast {

// Looked up when it is needed: linked, it would keep this library from loading beside a PyTorch without CUDA.
void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(found);
  }();
  void* stream = nullptr;
  if (function == nullptr || function(device, &stream) != 0)
    fail("PyTorch names no current stream of CUDA device ", device);
  return stream;
}

}  // namespace eefast
