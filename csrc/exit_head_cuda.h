// The CUDA C++ implementation of the op whose schema and reference stand in eefast/ops/exit_head.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace eefast {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> exit_head_cuda(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                                  const std::optional<Tensor>& threshold, const Tensor& rows,
                                                  const Tensor& positions, const Tensor& live,
                                                  const std::string& criterion, int64_t exit_index,
                                                  const Tensor& logits, const Tensor& confidence, const Tensor& exits);

}  // namespace eefast
