// The CPU implementation of the op whose schema and reference stand in eefast/ops/resident_forward.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace eefast {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> resident_forward(const Tensor& images, const Tensor& steps, const Tensor& maps,
                                                    const Tensor& groups, const Tensor& weights, const Tensor& packed,
                                                    const Tensor& thresholds, const std::string& criterion,
                                                    int64_t num_classes, bool bfloat16, int64_t threads,
                                                    const std::optional<Tensor>& seconds,
                                                    const std::optional<Tensor>& normalization);

// "portable", "avx2", "avx512" or "avx512_bf16": what the CPU kernels use here.
std::string instruction_set();

}  // namespace eefast
