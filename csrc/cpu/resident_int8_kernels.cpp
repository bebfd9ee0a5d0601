// The int8 kernels of the resident engine, compiled once per instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/instruction_set.h"
#include "cpu/resident_kernels.h"

namespace eefast::cpu {
namespace {

#define EEFAST_LANES_FOR_INT8
#define EEFAST_LANES_FILE "cpu/resident_int8_lanes.h"
#include "cpu/for_each_isa.h"

struct Chosen {
  const Kernels& kernels;
  ImageRow image_row;
};

#define EEFAST_CHOSEN(set) \
  Chosen { set::kKernels, set::image_row }

Chosen chosen() {
#ifdef EEFAST_X86
  switch (int8_instruction_set()) {
    case Int8InstructionSet::avx512_vnni: return EEFAST_CHOSEN(avx512_vnni);
#ifndef EEFAST_SANITIZED
    case Int8InstructionSet::avx_vnni:
#ifdef EEFAST_AVX_VNNI
      if (has_avx_vnni()) return EEFAST_CHOSEN(avx_vnni);
#endif
      return EEFAST_CHOSEN(avx512vl_vnni);
    case Int8InstructionSet::avx2: return EEFAST_CHOSEN(avx2);
#endif
    default: break;
  }
#endif
  return EEFAST_CHOSEN(portable);
}

}  // namespace

const Kernels& select_int8_kernels() { return chosen().kernels; }
ImageRow select_image_row() { return chosen().image_row; }

}  // namespace eefast::cpu
