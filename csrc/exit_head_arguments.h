// Checks the arguments of eefast::exit_head: tensors → the pointers and sizes that its kernels take.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "types.h"

namespace eefast {

using torch::stable::Tensor;

struct CheckedExitHead {
  ExitHeadArguments arguments;
  // Contiguous, maybe copies; to be kept until the kernel is done or, on CUDA, queued: memory that is freed then is
  // reused by later work of the same stream only.
  Tensor weight, bias, rows, positions;
  std::optional<Tensor> rule;
};

// Throws where an argument does not fit. What `live`, `rows` and `positions` hold is not read.
CheckedExitHead check_exit_head(bool on_cuda, const Tensor& features, const Tensor& weight, const Tensor& bias,
                                const std::optional<Tensor>& threshold, const Tensor& rows, const Tensor& positions,
                                const Tensor& live, const std::string& criterion, int64_t exit_index,
                                const Tensor& logits, const Tensor& confidence, const Tensor& exits,
                                const std::optional<Tensor>& rule);

}  // namespace eefast
