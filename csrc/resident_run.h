// Runs the network of a resident op on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>

#include "resident_program.h"

namespace eefast {

// The network of a source, its steps pointed at their weights; kept where it was read lately.
std::shared_ptr<const std::pair<ResidentSource, Network>> pointed_network(ResidentSource source);

// Numbers of a rule, one exit after the other; none without one. Checked.
std::vector<float> rule_numbers(const ResidentSource& source, const std::optional<Tensor>& rule);

// [2, channels], one row after the other. Checked.
std::vector<float> image_scaling(const ResidentSource& source, const Tensor& image);

// The answers to checked images, float32 or uint8, see eefast/ops; scaling: null, or that of images in int8; features:
// what a store writes; before: logits and confidence of the exit before, which a rule reads.
std::tuple<Tensor, Tensor, Tensor> run_resident(ResidentSource read, const Tensor& images, const Tensor& groups,
                                                const Tensor& thresholds, const std::optional<Tensor>& rule,
                                                int64_t threads, const std::optional<Tensor>& seconds,
                                                const float* scaling, const std::optional<Tensor>& features,
                                                const std::optional<Tensor>& before);

}  // namespace eefast
