// The CPU side of eefast::resident_int8: checks what networks of integers need.
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/instruction_set.h"
#include "ops.h"
#include "resident_run.h"
#include "tensors.h"

namespace eefast {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor, Tensor> resident_int8(
    const Tensor& images, const Tensor& steps, const Tensor& maps, const Tensor& groups, const Tensor& weights,
    const Tensor& packed, const Tensor& thresholds, const Tensor& image, const std::string& criterion,
    int64_t num_classes, int64_t threads, const std::optional<Tensor>& seconds, const std::optional<Tensor>& rule,
    const std::optional<Tensor>& features, const std::optional<Tensor>& before) {
  check_there("images", images);
  if (images.scalar_type() != ScalarType::Byte) check_dtype("images", images, ScalarType::Float, "float32");
  ResidentSource read =
      read_tables(images, steps, maps, groups, packed, thresholds, criterion, num_classes, Precision::int8);
  const std::vector<float> scaling = image_scaling(read, image);
  return run_resident(std::move(read), images, groups, thresholds, rule, threads, seconds, scaling.data(), features,
                      before);
}

std::string int8_instruction_set() {
  return std::string(cpu::kInt8InstructionSets[static_cast<std::size_t>(cpu::int8_instruction_set())]);
}

}  // namespace eefast
