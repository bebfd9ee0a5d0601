// What the ops need of tensors besides their numbers: new ones, dense ones, and where one stands.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

namespace eefast {

using torch::stable::Tensor;

// torch::stable::empty looks its op up by name in every call, which costs more than a kernel for one sample.
Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, int32_t device_type, int32_t device);

Tensor as_contiguous(const Tensor& tensor);

// "cpu", "cuda:0", …
std::string device_name(const Tensor& tensor);

}  // namespace eefast
