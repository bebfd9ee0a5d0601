// Creates tensors, makes them contiguous, names their device.
#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"

namespace eefast {

Tensor empty(const char* name, const std::vector<int64_t>& sizes, int32_t dtype, int32_t device_type, int32_t device) {
  std::vector<int64_t> strides(sizes.size(), 1);
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(1, sizes[1]);
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device_type,
                               device, &handle) != TORCH_SUCCESS) {
    fail("no memory could be had for ", name, " of shape ", brackets(sizes), ", ", aoti_torch_dtype_element_size(dtype),
         " bytes each; give fewer rows at a time");
  }
  return Tensor(handle);
}

Tensor as_contiguous(const char* name, const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::exception& error) {
    fail(name, " of shape ", shape(tensor), " cannot be made contiguous: ", error.what());
  }
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another kind of device";
}

}  // namespace eefast
