// The kernels of the resident engine, compiled once per instruction set.
#include "cpu/resident_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/instruction_set.h"

namespace eefast::cpu {
namespace {

#define EEFAST_LANES_FOR_BFLOAT16
#define EEFAST_LANES_FILE "cpu/resident_lanes.h"
#include "cpu/for_each_isa.h"

}  // namespace

const Kernels& select_kernels(Precision precision) {
  if (precision == Precision::int8) return select_int8_kernels();
#ifdef EEFAST_X86
  if (precision == Precision::bfloat16) return avx512_bf16::kKernels;
  const InstructionSet best = instruction_set();
  if (best > InstructionSet::avx2) return avx512::kKernels;
#ifndef EEFAST_SANITIZED
  if (best == InstructionSet::avx2) return avx2::kKernels;
#endif
#endif
  return portable::kKernels;
}

}  // namespace eefast::cpu
