// The CUDA side of eefast::gather_survivors: queues the kernel.
#include <cstdint>

#include "checks.h"
#include "cuda/gather_survivors.h"
#include "current_stream.h"
#include "gather_survivors_arguments.h"
#include "ops.h"

namespace eefast {

void gather_survivors_cuda(const Tensor& features, const Tensor& rows, const Tensor& live, const Tensor& out,
                           const std::optional<Tensor>& offset) {
  const CheckedGather checked = check_gather_survivors(true, features, rows, live, out, offset);
  const int32_t device = features.get_device_index();
  if (const char* const error = cuda::launch_gather_survivors(checked.arguments, device, current_stream(device))) {
    fail("the CUDA gather of survivors: ", error);
  }
}

}  // namespace eefast
