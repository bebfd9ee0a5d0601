// The CUDA C++ implementation of the op whose schema and reference stand in eefast/ops/compact.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace eefast {

using torch::stable::Tensor;

void compact_cuda(const Tensor& features, const Tensor& rows, const Tensor& live, const Tensor& out,
                  const std::optional<Tensor>& offset);

}  // namespace eefast
