// Checks the arguments of eefast::gather_survivors: tensors → the pointers and sizes that its kernels take.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "types.h"

namespace eefast {

using torch::stable::Tensor;

struct CheckedGather {
  GatherArguments arguments;
  // Contiguous, maybe a copy; to be kept until the kernel is done or, on CUDA, queued: memory that is freed then is
  // reused by later work of the same stream only.
  Tensor rows;
};

// Throws where an argument does not fit. What `live`, `rows` and `offset` hold is not read.
CheckedGather check_gather_survivors(bool on_cuda, const Tensor& features, const Tensor& rows, const Tensor& live,
                                     const Tensor& out, const std::optional<Tensor>& offset);

}  // namespace eefast
