// Asks the processor and the environment, once, which vector instructions there are.
#include "cpu/instruction_set.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>

namespace eefast::cpu {
namespace {

std::string_view variable(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

InstructionSet detect() {
#ifdef EEFAST_X86
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return InstructionSet::portable;
  }
  if (!__builtin_cpu_supports("avx512f")) return InstructionSet::avx2;
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl");
  return bf16 ? InstructionSet::avx512_bf16 : InstructionSet::avx512;
#else
  return InstructionSet::portable;
#endif
}

// ATEN_CPU_CAPABILITY is the variable that restricts the kernels of PyTorch.
InstructionSet limit() {
  const std::string_view wanted = variable("EEFAST_ISA"), torch = variable("ATEN_CPU_CAPABILITY");
  InstructionSet most = InstructionSet::avx512_bf16;
  if (torch == "default") most = InstructionSet::portable;
  if (torch == "avx2") most = InstructionSet::avx2;
  if (wanted.empty()) return most;
  const auto* const found = std::find(std::begin(kInstructionSets), std::end(kInstructionSets), wanted);
  if (found == std::end(kInstructionSets)) {
    throw std::runtime_error("EEFAST_ISA=" + std::string(wanted) +
                             " is unknown; choose one of portable, avx2, avx512, avx512_bf16");
  }
  return std::min(most, static_cast<InstructionSet>(found - std::begin(kInstructionSets)));
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet best = std::min(detect(), limit());
  return best;
}

}  // namespace eefast::cpu
