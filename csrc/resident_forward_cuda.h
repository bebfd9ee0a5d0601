// The CUDA side of the op whose schema and reference stand in eefast/ops/resident_forward.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace eefast {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> resident_forward_cuda(
    const Tensor& images, const Tensor& steps, const Tensor& maps, const Tensor& groups, const Tensor& weights,
    const Tensor& packed, const Tensor& thresholds, const std::string& criterion, int64_t num_classes, bool bfloat16,
    int64_t threads, const std::optional<Tensor>& seconds, const std::optional<Tensor>& normalization);

// The network as the kernel takes it, `cuda::Network` in bytes, and the shared memory that a block of it needs: for
// plans, and for tests that run the kernel elsewhere.
std::tuple<Tensor, int64_t> resident_network(const Tensor& images, const Tensor& steps, const Tensor& maps,
                                             const Tensor& groups, const Tensor& packed, const Tensor& thresholds,
                                             const std::string& criterion, int64_t num_classes, bool bfloat16);

}  // namespace eefast
