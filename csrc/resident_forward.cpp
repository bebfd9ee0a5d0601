// The CPU side of eefast::resident_forward: checks what float networks need.
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "cpu/instruction_set.h"
#include "ops.h"
#include "resident_run.h"

namespace eefast {

std::tuple<Tensor, Tensor, Tensor> resident_forward(
    const Tensor& images, const Tensor& steps, const Tensor& maps, const Tensor& groups, const Tensor& weights,
    const Tensor& packed, const Tensor& thresholds, const std::string& criterion, int64_t num_classes, bool bfloat16,
    int64_t threads, const std::optional<Tensor>& seconds, const std::optional<Tensor>& normalization,
    const std::optional<Tensor>& rule, const std::optional<Tensor>& features, const std::optional<Tensor>& before) {
  if (normalization) fail("normalization is for CUDA; normalise images beforehand");
  check_dtype("images", images, torch::headeronly::ScalarType::Float, "float32");
  if (bfloat16 && cpu::instruction_set() != cpu::InstructionSet::avx512_bf16) {
    fail("bfloat16 needs AVX512-BF16, which this processor lacks or EEFAST_ISA excludes; use float32");
  }
  return run_resident(
      read_tables(images, steps, maps, groups, packed, thresholds, criterion, num_classes, float_precision(bfloat16)),
      images, groups, thresholds, rule, threads, seconds, nullptr, features, before);
}

std::string instruction_set() {
  return std::string(cpu::kInstructionSets[static_cast<std::size_t>(cpu::instruction_set())]);
}

}  // namespace eefast
