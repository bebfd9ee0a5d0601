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

Int8InstructionSet detect_int8() {
#ifdef EEFAST_X86
  if (detect() == InstructionSet::portable) return Int8InstructionSet::portable;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (wide) return Int8InstructionSet::avx512_vnni;
  return has_avx_vnni() ? Int8InstructionSet::avx_vnni : Int8InstructionSet::avx2;
#else
  return Int8InstructionSet::portable;
#endif
}

// What EEFAST_ISA may name, and up to where each admits the kernels.
struct Limit {
  std::string_view name;
  InstructionSet floats;
  Int8InstructionSet int8;
};
constexpr Limit kLimits[] = {
    {"portable", InstructionSet::portable, Int8InstructionSet::portable},
    {"avx2", InstructionSet::avx2, Int8InstructionSet::avx2},
    {"avx_vnni", InstructionSet::avx2, Int8InstructionSet::avx_vnni},
    {"avx512", InstructionSet::avx512, Int8InstructionSet::avx2},
    {"avx512_vnni", InstructionSet::avx512, Int8InstructionSet::avx512_vnni},
    {"avx512_bf16", InstructionSet::avx512_bf16, Int8InstructionSet::avx512_vnni},
};

// ATEN_CPU_CAPABILITY is the variable that restricts the kernels of PyTorch.
Limit limit() {
  const std::string_view wanted = variable("EEFAST_ISA"), torch = variable("ATEN_CPU_CAPABILITY");
  Limit most = kLimits[std::size(kLimits) - 1];
  if (torch == "default") most = kLimits[0];
  if (torch == "avx2") most = kLimits[1];
  if (wanted.empty()) return most;
  for (const Limit& named : kLimits) {
    if (named.name == wanted) return {wanted, std::min(most.floats, named.floats), std::min(most.int8, named.int8)};
  }
  throw std::runtime_error("EEFAST_ISA=" + std::string(wanted) +
                           " is unknown; choose one of portable, avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16");
}

}  // namespace

bool has_avx_vnni() {
#ifdef EEFAST_AVX_VNNI
  return __builtin_cpu_supports("avxvnni");
#else
  return false;
#endif
}

InstructionSet instruction_set() {
  static const InstructionSet best = std::min(detect(), limit().floats);
  return best;
}

Int8InstructionSet int8_instruction_set() {
  static const Int8InstructionSet best = std::min(detect_int8(), limit().int8);
  return best;
}

}  // namespace eefast::cpu
