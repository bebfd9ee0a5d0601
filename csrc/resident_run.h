// Runs the network of a resident op on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "resident_program.h"

namespace eefast {

// The answers to checked images, float32 or uint8, see eefast/ops; scaling: null, or that of images in int8; features:
// what a store writes; before: logits and confidence of the exit before, which a rule reads.
std::tuple<Tensor, Tensor, Tensor> run_resident(ResidentSource read, const Tensor& images, const Tensor& groups,
                                                const Tensor& thresholds, const std::optional<Tensor>& rule,
                                                int64_t threads, const std::optional<Tensor>& seconds,
                                                const float* scaling, const std::optional<Tensor>& features,
                                                const std::optional<Tensor>& before);

}  // namespace eefast
